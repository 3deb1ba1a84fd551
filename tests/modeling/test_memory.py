"""Freed memory is used again instead of being cleared anew by the system."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from alro_fast.modeling.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(size << 20) for size in (9, 1, 12, 3, 10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(8):
    faults = step()
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_later_step_needs_no_new_pages():
    counts = [
        int(subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], check=True, capture_output=True).stdout)
        for keep in (False, True)
    ]
    assert counts[0] > 10_000 > 1_000 > counts[1]


def test_elsewhere_nothing_is_done(monkeypatch):
    from alro_fast.modeling import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    assert not memory.keep_freed_memory()
