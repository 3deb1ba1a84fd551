"""Licences of everything that alro_fast needs to run, as each package tells its own; status 1 where one is not among
the allowed.

    python scripts/licences.py            a table of what is installed of the dependencies and the extras
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

ALLOWED = {  # SPDX, and BSD where a package does not say which
    *("0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC"),
    *("LLVM-exception", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
}
WORDS = {  # what older packages call them
    "Apache": "Apache-2.0", "Apache 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0", "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0", "3-Clause BSD License": "BSD-3-Clause", "BSD License": "BSD",
    "BSD 3-Clause License": "BSD-3-Clause", "New BSD": "BSD-3-Clause", "ISC License (ISCL)": "ISC",
    "MIT License": "MIT", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}  # fmt: skip
OF_THE_DEVICE = ("nvidia-", "cuda-")  # CUDA's libraries come under NVIDIA's own terms, with torch for such a GPU
ROOT = "alro-fast"
EXTRAS = ("recranker", "baselines", "plots", "study", "ray", "cuda")  # what the package itself may import


def needed() -> dict[str, Distribution]:
    """What is installed of all that the package and its extras need, by name, itself included."""
    found: dict[str, Distribution] = {}
    todo = [ROOT]
    while todo:
        name = normal(todo.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # of another platform, or an extra that is not installed
            continue
        for requirement in found[name].requires or []:
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
            if extra is None or (name == ROOT and extra[1] in EXTRAS):
                todo.append(re.match(r"[\w.-]+", requirement)[0])
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licences(about: Distribution) -> set[str]:
    """Those a distribution names: in an SPDX expression, else in classifiers, else in the first of its own words."""
    expression = about.metadata.get("License-Expression")
    if expression:
        return {one for one in re.split(r"\s+(?:AND|OR|WITH)\s+|[()\s]+", expression) if one}
    classified = [
        one.split(" :: ")[-1] for one in about.metadata.get_all("Classifier", []) if one.startswith("License ::")
    ]
    told = [one for one in classified if one != "OSI Approved"]
    if not told:
        line = (about.metadata.get("License") or "").strip().split("\n")[0]
        told = [line] if line in WORDS else re.split(r"\s+(?:AND|OR)\s+", line)
    return {WORDS.get(one, one) for one in told if one} or {"none named"}


def refused(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Those with a licence that is not allowed."""
    return {
        name: told - ALLOWED for name, told in found.items() if told - ALLOWED and not name.startswith(OF_THE_DEVICE)
    }


def main() -> int:
    found = {name: licences(about) for name, about in sorted(needed().items())}
    if len(found) < 10:
        print(f"{ROOT} is not installed here, or not its dependencies", file=sys.stderr)
        return 2
    for name, told in found.items():
        print(f"{name:<28} {', '.join(sorted(told))}")
    bad = refused(found)
    for name, told in bad.items():
        print(f"error: {name}: {', '.join(sorted(told))} is not among the allowed licences", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
