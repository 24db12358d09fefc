"""All commands, how they are run, and what is printed if one fails."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper

import typer

import pomelo
from pomelo.cli import accounts, alerts, audit, doctor, keys, log, models, prices, run, serve, usage
from pomelo.cli.terminal import Commands, discard_output, explain, print_line


def program() -> typer.Typer:
    """Returns the command line with all commands."""
    app = Commands(
        "Run AI tasks (text, images, speech) through one API, over gRPC and REST.",
        name="pomelo",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.add("serve", serve.serve)
    app.add("gateway", serve.gateway)
    app.add("run", run.run)
    app.add("models", models.models)
    app.add_typer(prices.commands(), name="prices")
    app.add_typer(accounts.commands(), name="accounts")
    app.add_typer(keys.commands(), name="keys")
    app.add("usage", usage.usage)
    app.add("audit", audit.audit)
    app.add("log", log.log)
    app.add_typer(alerts.commands(), name="alerts")
    app.add("doctor", doctor.doctor)
    return app


def run_command(command: Callable[..., object]) -> None:
    """Runs the command of `sys.argv` and ends the process: status 0, 1 for an error, 2 for wrong usage."""
    # grpc's own log repeats errors that are printed in one line below. Setting the variable brings it back.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed by the caller
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    out = sys.stdout
    if isinstance(out, TextIOWrapper) and codecs.lookup(out.encoding).name != "utf-8":
        # A name or a text may have characters that the locale's encoding lacks.
        out.reconfigure(encoding="utf-8", errors=out.errors)
    status: int | str | None = 0
    failure: Exception | None = None
    try:
        command(prog_name="pomelo")
    except SystemExit as ended:
        status = ended.code
    except Exception as error:
        failure, status = error, 1
    # The interpreter does this, too, but would end with a status of its own if it fails.
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        failure, status = failure or error, 1
    if failure is not None and not isinstance(failure, BrokenPipeError):
        _print_failure(failure)
    sys.exit(status)


def _print_failure(error: Exception) -> None:
    """Prints why a command has failed.

    Raises:
        Exception: the error itself, if it is an internal one.
    """
    line = ". ".join([explain(error), *getattr(error, "__notes__", ())])
    if getattr(error, "code", "") == "store_unavailable":
        line += ". See: pomelo doctor"  # which names the store or archive that fails, and the reason
    settings = sys.modules.get("pomelo.settings")
    # Only settings have errors of several lines; other text stays on one line.
    is_settings_error = settings is not None and isinstance(error, settings.SettingsError)
    for part in line.split("\n") if is_settings_error else [line]:
        print_line(f"pomelo: {part}", err=True)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"pomelo {pomelo.__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Print the version or run a command."""
