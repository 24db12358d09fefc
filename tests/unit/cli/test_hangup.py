"""SIGHUP waits while a process starts, unless it says that a terminal was closed."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator

import pytest

from pomelo.cli.hangup import signals_held


@pytest.fixture(autouse=True)
def _unblocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Errors(io.StringIO):
    """Standard error, which may be a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_sighup_waits_only_while_a_process_is_started_and_never_on_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Errors(terminal))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with signals_held():
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert (signal.SIGHUP in held, signal.SIGINT in held) == (not terminal, True)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
