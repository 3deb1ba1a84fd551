"""What an install gives: light imports, kernels beside the package, no shadowing of others."""

from __future__ import annotations

import subprocess
import sys

from places import ROOT

import alro_fast
from alro_fast.errors import AlroFastError


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_is_light_and_needs_neither_triton_nor_a_compiler():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['alro_fast._cpp'] = None\n"
        "import alro_fast; print('torch' in sys.modules)\n"
        "alro_fast.alro_loss; from alro_fast.ops import available_backends; print(available_backends('cpu'))"
    )
    light, backends = python(code).splitlines()
    assert light == "False"
    assert backends == "['eager']"


def test_every_public_name_resolves():
    for name in alro_fast.__all__:
        assert getattr(alro_fast, name) is not None


def test_the_error_is_public():
    assert alro_fast.AlroFastError is AlroFastError


def test_the_checkout_does_not_shadow_the_distribution_named_kernels():
    """transformers asks for a package called `kernels`; from the checkout it must see what it sees elsewhere."""
    code = "import sys; sys.path.insert(0, {!r}); from transformers.utils import is_kernels_available as f; print(f())"
    assert python(code.format(str(ROOT))) == python(code.format("/"))
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_import_as_part_of_the_package():
    assert "kernels" in python("import alro_fast.kernels as k; print(k.__path__)")
