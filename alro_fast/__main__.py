"""`python -m alro_fast COMMAND [options]`: what `alro-fast` does."""

from .cli import main

if __name__ == "__main__":
    main()
