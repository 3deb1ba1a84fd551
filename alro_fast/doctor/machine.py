"""What this machine has: packages, extras, trackers, backends, devices, compilers."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from transformers.integrations import get_available_reporting_integrations

from .. import __version__
from ..ops.backends import cpp
from ..ops.dispatch import BACKENDS, available_backends

DISTRIBUTION = "alro-fast"
SHOWN = ("torch", "triton", "transformers", "peft", "accelerate")
FOR_DEVELOPERS = {"bench", "dev", "docs", "test"}


def machine() -> dict[str, Any]:
    """Rows of the report, by their names."""
    return {
        "versions": {"alro_fast": __version__, "Python": platform.python_version(), **_versions(SHOWN)},
        "extras": _extras(),
        "trackers": sorted(get_available_reporting_integrations()),
        "backends": {kind: available_backends(kind) for kind in ("cpu", *_accelerators())},
        "cpu": _cpu(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "compilers": {name: shutil.which(os.environ.get(variable) or name) or "not found" for name, variable in _TOOLS},
    }


_TOOLS = (("cc", "CC"), ("c++", "CXX"), ("nvcc", "NVCC"))


def problems(found: dict[str, Any]) -> list[str]:
    """What has to be mended, each with what to do."""
    wrong = list(unmet(_requirements()))
    for kind, names in found["backends"].items():
        best = "cpp" if kind == "cpu" else "triton"
        if best in BACKENDS and best not in names and kind in ("cpu", "cuda"):
            reason = _reason(best, kind)
            cure = "install a C++ compiler and then alro_fast again" if best == "cpp" else "install triton"
            wrong.append(f"backend {best} does not serve {kind} ({reason}): the slower {names[0]} does; {cure}")
    wrong += [each for each in [found.get("model", {}).get("refused")] if each]
    return wrong


def unmet(requirements: Iterable[Requirement]) -> Iterable[str]:
    """Of requirements without extras: those that what is installed does not meet."""
    for one in requirements:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        version = _version(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            has = "not installed" if version is None else f"version {version}"
            yield f"{one.name} is {has}; expected {one.specifier}: pip install '{one.name}{one.specifier}'"


def _requirements() -> list[Requirement]:
    """What the package asks for; nothing where it runs from a checkout that is not installed."""
    try:
        return [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions(names: Iterable[str]) -> dict[str, str]:
    return {name: _version(name) or "not installed" for name in names}


def _extras() -> dict[str, str]:
    """Of each extra for users: "installed", or what lacks."""
    found: dict[str, list[str]] = {}
    for one in _requirements():
        extra = re.search(r"""extra == ["'](\w+)["']""", str(one.marker or ""))
        if extra and extra[1] not in FOR_DEVELOPERS:
            found.setdefault(extra[1], []).extend([one.name] * (_version(one.name) is None))
    return {name: f"lacks {' and '.join(lacks)}" if lacks else "installed" for name, lacks in found.items()}


def _accelerators() -> list[str]:
    return ["cuda"] if torch.cuda.is_available() else []


def _reason(backend: str, kind: str) -> str:
    from importlib import import_module

    try:
        module = import_module(f"..ops.backends.{backend}", __package__)
    except ImportError as error:
        return str(error)
    return str(module.unavailable(torch.device(kind), torch.float32))


def _cpu() -> dict[str, Any]:
    """Name, cores that this process may use, memory in GiB, and the instruction set of the C++ kernels."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", info.read_text(), flags=re.M) if info.is_file() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "name": named[1] if named else platform.machine(), "cores": cores, "threads": torch.get_num_threads(),
        "GiB": round(memory, 1), "kernels": cpp.instruction_set() or "not installed",
    }  # fmt: skip


def _gpu(index: int) -> str:
    about = torch.cuda.get_device_properties(index)
    return f"{about.name}, compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"
