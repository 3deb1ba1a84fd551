"""Text that a stranger's template makes, in bounded time and memory.

A chat template is a program of its tokenizer's author. Jinja's sandbox keeps it from files, not from loops over loops,
texts times a billion or powers of powers, some of which no signal interrupts: it runs in a child of this process.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Callable

SECONDS, WAIT = 2, 20  # of computing; until then also on a busy machine
MEMORY, LONGEST = 512 << 20, 1 << 20  # bytes beyond what the process has; bytes of a text


def bounded(make: Callable[[], str]) -> str:
    """What `make()` returns. ValueError with what it raised, or where it had to be stopped."""
    into, out = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(make, out)
    os.close(out)
    parts: list[bytes] = []
    until = time.monotonic() + WAIT
    try:
        while select.select([into], [], [], max(0.0, until - time.monotonic()))[0]:
            if not (part := os.read(into, 1 << 16)):
                break
            parts.append(part)
    finally:
        os.close(into)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    answer = b"".join(parts)
    if answer[-1:] not in (b"+", b"-") or len(answer) > LONGEST:
        raise ValueError(f"it took more than {SECONDS} seconds, {MEMORY >> 20} MiB or {LONGEST:,} bytes of text")
    if answer.endswith(b"-"):
        raise ValueError(answer[:-1].decode())
    return answer[:-1].decode()


def _answer(make: Callable[[], str], out: int) -> None:
    """In the child: the text and a plus, or what was raised and a minus; nothing where a limit was met."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        pass  # where memory is not told, time is the limit
    try:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        answer = make().encode(errors="replace") + b"+"
    except MemoryError:
        answer = b""
    except BaseException as error:
        answer = str(error).encode(errors="replace")[:2000] + b"-"
    with contextlib.suppress(OSError, MemoryError):
        view = memoryview(answer[: LONGEST + 2])
        while view:
            view = view[os.write(out, view) :]
    os._exit(0)
