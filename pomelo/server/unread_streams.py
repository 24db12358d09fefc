"""Ends streams whose callers stop reading.

Until then such a stream keeps a concurrent task, its reservation and a connection to the vendor. HTTP/2 shows
a server only that a message does not fit into the caller's window yet. Clients open the window further when
they have read up to half of it, which can be half a MiB; so it takes minutes to recognise a slow caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

UNREAD_PER_BYTE = -1 / 1024
"""What a byte of a message adds to the initial value of `unread`: a caller reads at least 1 KiB a second."""

_LOOKS = 8
"""How often streams are looked at within the time after which they end. Looks are counted, not seconds: while
the event loop is blocked, no message can be sent."""


class Stream(Protocol):
    """A stream of messages. `unread` says for how many seconds the message that is being sent was not read,
    as of the last look; it starts at UNREAD_PER_BYTE times its size. None: no message is being sent."""

    unread: float | None


S = TypeVar("S", bound=Stream)


class UnreadStreams(Generic[S]):
    """The open streams of a server."""

    def __init__(self) -> None:
        self._open: set[S] = set()
        self.add = self._open.add
        self.discard = self._open.discard

    async def watch(self, seconds: float, end: Callable[[S], None]) -> None:
        """Until it is cancelled, ends streams that wait for `seconds` for a message to be read."""
        pause = seconds / _LOOKS
        while True:
            await asyncio.sleep(pause)
            for stream in list(self._open):
                if stream.unread is not None:
                    stream.unread += pause
                    if stream.unread > seconds:
                        end(stream)
