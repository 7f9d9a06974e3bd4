"""`python -m distkv` is the command `distkv`."""

from distkv.cli import main

main()
