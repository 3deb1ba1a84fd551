"""Build the sdist and the wheel, say what does not belong in them, and run the README's first command from the wheel.

`make wheel` runs it with the environment's Python, which has the package's dependencies and `build`. The wheel goes
into an environment of its own, without a compiler and without the checkout; dependencies are read where they are
installed already, by a .pth file, so nothing is downloaded but what builds the package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "pyproject.toml"}  # in the sdist
BUILT = "alro_fast/_cpp."


def tracked() -> set[str]:
    """What git has, or would take: paths from the root."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def wheel_differs(held: Iterable[str], of_checkout: Iterable[str]) -> dict[str, set[str]]:
    """What a wheel lacks and what it should not hold, beside the package, its kernels and one extension module."""
    roots = {"alro_fast/": "", "kernels/": "alro_fast/"}
    wanted = {f"{put}{name}" for name in of_checkout for root, put in roots.items() if name.startswith(root)}
    files = {name for name in held if ".dist-info/" not in name}
    built = {name for name in files if name.startswith(BUILT)}
    licences = {name for name in held if name.endswith(".dist-info/licenses/LICENSE")}
    lacking = wanted - files | (set() if len(built) == 1 else {BUILT}) | (set() if licences else {"LICENSE"})
    return {"lacks": lacking, "should not hold": files - wanted - built}


def sdist_differs(held: Iterable[str], of_checkout: Iterable[str]) -> dict[str, set[str]]:
    """What an sdist lacks and what it should not hold: sources, and the files beside them; its first folder is cut."""
    wanted = {name for name in of_checkout if name in BESIDE or name.startswith(("alro_fast/", "csrc/", "kernels/"))}
    files = {name.partition("/")[2] for name in held} - {"PKG-INFO"}
    return {"lacks": wanted - files, "should not hold": files - wanted}


def refuse(name: str, differs: dict[str, set[str]]) -> None:
    """SystemExit where something differs."""
    for how, files in differs.items():
        if files:
            raise SystemExit(f"{name} {how}: {', '.join(sorted(files))}")


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it."""
    for old in folder.glob("alro_fast-*"):
        old.unlink()
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def run_without_a_compiler(wheel: Path, folder: Path) -> None:
    """Install the wheel into an empty environment and train the demo, by the C++ kernels that it brought."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    scheme = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site = Path(sysconfig.get_path("platlib", "venv", vars=scheme))
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('platlib')}\n")
    environment = {
        "PATH": str(python.parent), "CC": "/bin/false", "CXX": "/bin/false", "HOME": str(folder), "HF_HUB_OFFLINE": "1",
        **{name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"},
    }  # fmt: skip

    def run(*words: str) -> str:
        done = subprocess.run([str(python), *words], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}")
        return done.stdout

    asked = (
        "import alro_fast, alro_fast.ops as o, json; print(json.dumps([alro_fast.__file__, o.available_backends()]))"
    )
    where, backends = json.loads(run("-c", asked))
    if not Path(where).is_relative_to(folder):
        raise SystemExit(f"the package that runs is {where}, not the wheel's")
    if "cpp" not in backends:
        raise SystemExit(f"the wheel's C++ kernels do not serve: {backends}")
    print(run("-m", "alro_fast.train"))
    for left in ("adapter_model.safetensors", "results.json", "report.html"):
        if not (folder / "out" / "demo" / left).is_file():
            raise SystemExit(f"the demo left no {left}")


def main() -> None:
    sdist, wheel = build(ROOT / "dist")
    with tarfile.open(sdist) as archive:
        refuse(sdist.name, sdist_differs([each.name for each in archive if each.isfile()], tracked()))
    with zipfile.ZipFile(wheel) as packed:
        refuse(wheel.name, wheel_differs(packed.namelist(), tracked()))
    with tempfile.TemporaryDirectory() as folder:
        run_without_a_compiler(wheel, Path(folder))
    print(f"{sdist.name} and {wheel.name} hold what they should; the demo ran from the wheel, without a compiler")


if __name__ == "__main__":
    main()
