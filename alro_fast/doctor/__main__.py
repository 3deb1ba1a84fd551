"""`python -m alro_fast.doctor`."""

from ..cli import launch

if __name__ == "__main__":
    launch("doctor")
