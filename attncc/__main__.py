"""`python -m attncc` is the command `attncc`."""

from attncc.cli import main

main()
