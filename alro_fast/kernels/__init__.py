"""Triton kernels. Their sources live in the checkout's top-level `kernels/`; an install puts them beside this file."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "pyproject.toml").is_file():  # running from a checkout: look into its kernels/ folder too
    __path__.append(str(_checkout / "kernels"))
