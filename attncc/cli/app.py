"""The typer app: its commands by name, and the entry point."""

from __future__ import annotations

import typer

from attncc.cli import (
    check,
    compile,
    explain,
    export,
    list,
    merge,
    package,
    report,
    schema,
    targets,
    tune,
    verify,
    worker,
)

HELP = """A compiler for attention: a variant in a few lines of YAML becomes an importable package of kernels.

Exit codes: 0 done; 1 a check failed; 2 the spec or the command line is wrong; 3 the spec is valid, but not
supported yet; 70 a bug in attncc.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for _module in (compile, check, explain, export, list, merge, package, report, schema, targets, tune, verify, worker):
    app.command(_module.__name__.rpartition(".")[2])(_module.command)


def main() -> None:
    """Runs the command line of this process."""
    app()
