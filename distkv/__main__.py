"""`python -m distkv` is the command `distkv`."""

from distkv.commands.main import main

main()
