"""The command line: `pomelo serve`, `run`, `keys` and the rest, a module for each noun.

Only typer and the standard library are imported until a command runs, so that help is quick; what a command
needs, it imports itself. An error ends it with one line on stderr and status 1.
"""

from __future__ import annotations

import os
import sys

import typer

import pomelo
from pomelo.cli import accounts, audit, doctor, keys, models, prices, run, serve, usage
from pomelo.cli.terminal import explain, say

__all__ = ["main", "program"]


def program() -> typer.Typer:
    """The whole command line. Building it runs nothing."""
    app = typer.Typer(
        name="pomelo",
        help="AI tasks (text, images, speech) for other software: one contract, over gRPC and REST.",
        no_args_is_help=True,
        add_completion=False,
        # Rich takes longer to load than everything else of `pomelo --help`.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command("serve")(serve.serve)
    app.command("gateway")(serve.gateway)
    app.command("run")(run.run)
    app.command("models")(models.models)
    app.add_typer(prices.commands(), name="prices")
    app.add_typer(accounts.commands(), name="accounts")
    app.add_typer(keys.commands(), name="keys")
    app.command("usage")(usage.usage)
    app.command("audit")(audit.audit)
    app.command("doctor")(doctor.doctor)
    return app


def main() -> None:
    """Runs the command of `sys.argv` and ends the process: status 0, 1 for an error, 2 for wrong usage."""
    # grpc's own log repeats, in C++ terms, what we say in a line. Whoever wants it sets the variable.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        program()(prog_name="pomelo")
    except BrokenPipeError:
        # Whoever read our output has left; the interpreter would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        settings = sys.modules.get("pomelo.settings")
        # Only settings have errors of several lines; text from elsewhere stays on one.
        own = settings is not None and isinstance(error, settings.SettingsError)
        for each in line.split("\n") if own else [line]:
            say(f"pomelo: {each}", err=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pomelo {pomelo.__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """AI tasks (text, images, speech) for other software: one contract, over gRPC and REST."""
