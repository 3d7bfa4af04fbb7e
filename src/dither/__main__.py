"""`python -m dither`: the same as the `dither` command."""

from dither.cli import main

main()
