"""`python -m emaswap`: the `emaswap` command."""

from emaswap.cli import main

if __name__ == "__main__":
    main()
