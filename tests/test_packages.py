"""What goes into the sdist, the wheel and the image, and how they are made. `make wheel` builds and runs them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib

import pytest
import yaml
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FILES = {"alro_fast/train.py", "alro_fast/kernels/__init__.py", "kernels/gather.py", "csrc/module.cpp", "README.md"}
WHEEL = {
    "alro_fast/train.py", "alro_fast/kernels/__init__.py", "alro_fast/kernels/gather.py", "alro_fast/_cpp.abi3.so",
    "alro_fast-1.dist-info/METADATA", "alro_fast-1.dist-info/licenses/LICENSE",
}  # fmt: skip


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_packages", ROOT / "scripts" / "check_packages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "held, lacks, too_much",
    [
        (WHEEL, set(), set()),
        (WHEEL - {"alro_fast/_cpp.abi3.so"}, {"alro_fast/_cpp."}, set()),
        (WHEEL - {"alro_fast-1.dist-info/licenses/LICENSE"}, {"LICENSE"}, set()),
        (WHEEL - {"alro_fast/kernels/gather.py"}, {"alro_fast/kernels/gather.py"}, set()),
        (WHEEL | {"tests/data.csv", "csrc/module.cpp"}, set(), {"tests/data.csv", "csrc/module.cpp"}),
    ],
)
def test_a_wheel_holds_the_package_and_nothing_else(check, held, lacks, too_much):
    assert check.wheel_differs(held, FILES) == {"lacks": lacks, "should not hold": too_much}


def test_an_sdist_holds_the_sources_and_nothing_else(check):
    whole = {f"alro_fast-1/{name}" for name in FILES} | {"alro_fast-1/PKG-INFO"}
    same = {"lacks": set(), "should not hold": set()}
    assert check.sdist_differs(whole, FILES | {"tests/test_x.py"}) == same
    assert check.sdist_differs(whole - {"alro_fast-1/csrc/module.cpp"}, FILES)["lacks"] == {"csrc/module.cpp"}
    assert check.sdist_differs(whole | {"alro_fast-1/tests/x.csv"}, FILES)["should not hold"] == {"tests/x.csv"}
    with pytest.raises(SystemExit, match=r"a\.whl lacks: x, y"):
        check.refuse("a.whl", {"lacks": {"y", "x"}})


def test_folders_that_the_sdist_leaves_out_are_all_that_it_does_not_need(check):
    """A new folder or file at the top is in the sdist, or left out by name."""
    tops = {name.partition("/")[0] for name in check.tracked()}
    left_out = {name.strip("/") for name in PROJECT["tool"]["scikit-build"]["sdist"]["exclude"]}
    wanted = check.BESIDE | {"alro_fast", "csrc", "kernels"}
    assert {top for top in tops if not top.startswith(".")} - wanted == left_out - {".*"}


def test_wheels_are_for_the_stable_abi_of_one_python():
    first = PROJECT["tool"]["scikit-build"]["wheel"]["py-api"]
    builds = PROJECT["tool"]["cibuildwheel"]["build"]
    assert f"{first}-*" == builds[-1]  # all later Pythons take this one
    assert PROJECT["project"]["requires-python"] == f">=3.{builds[0][3:5]}"
    rules = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "STABLE_ABI" in rules  # else the tag would promise what the module does not keep
    assert "${SKBUILD_SABI_COMPONENT}" in rules


def test_the_workflows_are_yaml_and_publish_only_what_was_attested():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["publish"]["needs"] == "attest"
    assert set(jobs["attest"]["needs"]) == {"sdist", "wheels"}
    assert jobs["publish"]["if"] == "vars.PUBLISH == 'true'"
    for job in jobs.values():
        assert job["timeout-minutes"]
        assert set(job.get("needs", [])) <= jobs.keys() or job["needs"] in jobs


def test_the_image_is_made_of_things_that_exist():
    """Its instructions, what it copies and starts, and what its file of exceptions lets in."""
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip() and not line.startswith("#")]
    known = {"ARG", "FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    steps = [line.split(None, 1) for line in lines]
    assert {name for name, _ in steps} == known
    assert [name for name, _ in steps][:2] == ["ARG", "FROM"]
    declared = {given.partition("=")[0] for name, given in steps if name == "ARG"}
    assert set(re.findall(r"\$\{(\w+)\}", text)) <= declared
    (entry,) = (given for name, given in steps if name == "ENTRYPOINT")
    assert entry == f'["{next(iter(PROJECT["project"]["scripts"]))}"]'
    torch = next(each for each in PROJECT["project"]["dependencies"] if each.startswith("torch"))
    assert f'"{torch}"' in text
    for name, given in steps:
        if name == "RUN":
            shlex.split(given)
    let_in = re.findall(r"^!(.+)$", (ROOT / "docker" / "Dockerfile.dockerignore").read_text(), flags=re.M)
    assert all((ROOT / name).exists() for name in let_in)
    assert {"alro_fast", "csrc", "kernels", "CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md"} <= set(let_in)
