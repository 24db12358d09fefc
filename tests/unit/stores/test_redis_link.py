"""One connection to a Redis server: when it is given up, and how it ends."""

from __future__ import annotations

import asyncio

import pytest
from redis import exceptions as errors

from pomelo.stores.redis.link import Command, Link, Login, open_link, pack
from tests.unit.stores.fake_redis import FakeServer

LOGIN = Login(0.2)


class SlowTransport(asyncio.Transport):
    """Sends nothing, or as much as a test says."""

    unsent = 1_000
    aborted = False

    def write(self, data: object) -> None: ...

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True


async def test_a_server_that_reads_a_large_command_slowly_is_not_silent() -> None:
    link, transport = Link(3600.0), SlowTransport()
    link.connection_made(transport)
    link.send([Command(pack(("GET",)), asyncio.get_running_loop().create_future())])

    def look() -> bool:
        """Looks once; returns whether the server is given up."""
        assert link._watchdog is not None
        link._watchdog.cancel()
        link._watch()
        return transport.aborted

    for _ in range(20):
        transport.unsent -= 1
        assert not look()
        assert not look()
    assert [look() for _ in range(3)] == [False, False, True]


async def test_a_link_that_is_being_closed_is_not_used(server: FakeServer) -> None:
    link = await open_link(("127.0.0.1", server.port), LOGIN)
    assert link.usable
    assert link._transport is not None
    link._transport.close()
    assert not link.usable  # before the event loop says that it is lost
    await link.lost


async def test_a_closed_link_fails_what_it_owes_and_looks_no_more(server: FakeServer) -> None:
    server.answer = lambda chunk: b""
    link = await open_link(("127.0.0.1", server.port), LOGIN)
    replies = [asyncio.get_running_loop().create_future() for _ in range(2)]
    replies[0].cancel()
    link.send([Command(pack(("GET",)), reply) for reply in replies])
    watchdog = link._watchdog
    assert watchdog is not None
    link.close(errors.ConnectionError("closed"))
    assert (watchdog.cancelled(), link._watchdog, link.usable) == (True, None, False)
    with pytest.raises(errors.ConnectionError, match="closed"):
        await replies[1]
    await link.lost
