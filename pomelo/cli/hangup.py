"""Holds SIGHUP while a process starts, and SIGINT in workers. It imports little, because a signal may come at
any moment."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def hold_hangup() -> None:
    """Lets SIGHUP wait until the server can reload: it would end a process that is still starting. On a
    terminal it does not wait, because it says that the terminal was closed."""
    if not sys.stderr.isatty():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


@contextmanager
def signals_held() -> Iterator[None]:
    """A process that is started within the context holds SIGHUP until it can reload, and SIGINT for ever:
    Ctrl-C reaches all processes, and the one that has started it ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    hold_hangup()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
