"""Ctrl-C at any time of a command ends it without a trace."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

import pomelo

PROGRAM = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.{handler})
sys.meta_path.insert(0, Interrupting())
from pomelo.cli import main
main()
"""
VERSION = f"pomelo {pomelo.__version__}\n"


@pytest.mark.parametrize(
    ("module", "handler", "command", "outcome"),
    [
        ("typer", "default_int_handler", "--version", (-signal.SIGINT, "", "")),
        ("pomelo.cli.usage", "default_int_handler", "--version", (-signal.SIGINT, "", "")),
        ("pomelo.settings", "default_int_handler", "models", (130, "", "")),
        # A program in the background of a script ignores it.
        ("typer", "SIG_IGN", "--version", (0, VERSION, "")),
    ],
)
def test_ctrl_c_ends_a_command_without_a_trace(
    module: str, handler: str, command: str, outcome: tuple[int, str, str]
) -> None:
    program = PROGRAM.format(module=module, handler=handler)
    ended = subprocess.run(
        [sys.executable, "-c", program, command], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == outcome
