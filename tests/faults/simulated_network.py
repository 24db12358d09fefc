"""An event loop whose time is simulated, and a network to a real Redis server with faults at random.

Hardly anything waits: time jumps to the next timer, and the server is asked by a blocking socket. So hours of faults
take seconds, and the same random numbers give the same run.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from hiredis import Reader

from pomelo.stores.redis.link import Link, Login

_INCOMPLETE = object()


_LATE = 100.0
"""Real seconds in which a thread must have done its work."""


class _Selector(selectors.BaseSelector):
    """Waits only for threads, while they are `busy`. Otherwise `now` is set to the end of the wait."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.busy: Callable[[], bool] = lambda: False
        self._real = selectors.DefaultSelector()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout != 0.0 and (timeout is None or self.busy()):
            ready = self._real.select(_LATE)
            assert ready, "everything waits for something that never happens"
            return ready
        self.now += max(0.0, timeout)
        return self._real.select(0)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own. Work for executors is done immediately, in its thread."""

    def __init__(self) -> None:
        self._simulated = _Selector()
        super().__init__(self._simulated)

    def time(self) -> float:
        return self._simulated.now

    def wait_while(self, busy: Callable[[], bool]) -> None:
        """Lets no time pass while threads are `busy`, which call `call_soon_threadsafe` at the end."""
        self._simulated.busy = busy

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class Network:
    """The way from one process to the server on a port of loopback. With `faults`, commands and replies are
    delayed or lost, and connections are reset; commands may arrive after their connection was reset."""

    def __init__(self, port: int, random: Random) -> None:
        self.faults = 0.0
        """How likely each delivery is to fail or to be late."""
        self.blocked_until = 0.0
        """Nothing arrives before that time."""
        self.random = random
        self._port = port

    async def open_link(self, address: tuple[str, int], login: Login) -> Link:
        """In place of `pomelo.stores.redis.link.open_link`."""
        link = Link(login.timeout)
        link.connection_made(_Connection(self, link, self._port))
        return link

    def delay(self) -> float:
        """Seconds that a delivery takes."""
        now = asyncio.get_running_loop().time()
        late = self.random.choice((0.01, 0.2, 0.5, 1.5, 4.0)) if self.random.random() < self.faults else 0.0
        return max(0.0, self.blocked_until - now) + late + self.random.random() * 0.002

    def is_lost(self) -> bool:
        return self.random.random() < self.faults


class _Connection(asyncio.Transport):
    """A connection, which keeps the order of what is sent in each direction."""

    def __init__(self, network: Network, link: Link, port: int) -> None:
        super().__init__()
        self._network = network
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._replies = Reader(notEnoughData=_INCOMPLETE)
        self._closing = False
        self._arrives = self._returns = 0.0
        """When the last commands arrive, and the last replies."""
        self._in_transit = 0

    def write(self, data: Any) -> None:
        if not self._closing:
            self._arrives = self._after(self._arrives)
            self._in_transit += 1
            self._loop.call_at(self._arrives, self._deliver, bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._link.connection_lost, None)
            self._close_socket()

    def _deliver(self, data: bytes) -> None:
        """The server executes commands, also those of a closed connection, unless they are lost."""
        self._in_transit -= 1
        if self._network.is_lost() or (self._closing and self._network.random.random() < 0.5):
            self.abort()
        else:
            replies = self._execute(data)
            if self._network.is_lost():
                self.abort()
            else:
                self._returns = self._after(self._returns)
                self._loop.call_at(self._returns, self._return, replies)
        self._close_socket()

    def _after(self, last: float) -> float:
        """When a delivery arrives that follows the last one: timers of the same time have no order."""
        return max(last + 1e-6, self._loop.time() + self._network.delay())

    def _execute(self, data: bytes) -> bytes:
        commands, count = Reader(notEnoughData=_INCOMPLETE), 0
        commands.feed(data)
        while commands.gets() is not _INCOMPLETE:
            count += 1
        self._socket.sendall(data)
        replies = b""
        while count:
            part = self._socket.recv(1 << 16)
            assert part, "the server has closed the connection"
            replies += part
            self._replies.feed(part)
            while self._replies.gets() is not _INCOMPLETE:
                count -= 1
        return replies

    def _return(self, replies: bytes) -> None:
        if not self._closing:
            self._link.data_received(replies)

    def _close_socket(self) -> None:
        if self._closing and not self._in_transit:
            self._socket.close()
