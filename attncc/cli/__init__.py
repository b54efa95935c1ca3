"""The command line: one file a command, each a call of the driver."""

from attncc.cli.app import app, main

__all__ = ["app", "main"]
