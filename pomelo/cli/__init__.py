"""The command line: `pomelo serve`, `run`, `keys` and others, one module for each noun.

Commands import what they need when they run, so that `pomelo --help` loads only typer and the standard
library. An error ends a command with one line on stderr and status 1.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Runs the command of `sys.argv` and ends the process: status 0, 1 for an error, 2 for wrong usage."""
    # Until typer takes it, Ctrl-C would print a trace. As a signal it ends the process silently.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pomelo.cli.commands import program, run_command

    command = program()
    signal.signal(signal.SIGINT, handler)
    run_command(command)
