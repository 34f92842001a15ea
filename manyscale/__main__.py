"""`python -m manyscale`: the command line."""

from manyscale.cli import main

main()
