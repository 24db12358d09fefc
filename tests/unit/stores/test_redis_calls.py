"""Calls over the connection to Redis: which deadline they share, and what is said about a failure."""

from __future__ import annotations

import asyncio
import logging

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.ledger import UnknownOutcomeError
from pomelo.stores.redis import connection as connection_module
from pomelo.stores.redis.client import SingleServer
from tests.unit.refusals import refused
from tests.unit.stores.fake_redis import FakeServer
from tests.unit.stores.test_redis_connection import connected


async def test_a_call_within_another_shares_its_deadline(server: FakeServer) -> None:
    async with connected(server.port, seconds=60.0) as connection:
        with connection.one_deadline(5.0):
            outer = connection._start(("GET",))
            with connection.one_deadline(30.0):
                inner = connection._start(("GET",))
        later = connection._start(("GET",))
        assert inner.deadline == outer.deadline < later.deadline
        assert await asyncio.gather(*[each.reply for each in (outer, inner, later)]) == [b"OK"] * 3


async def test_no_call_waits_for_a_repetition_after_its_deadline(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_WAIT_INITIAL", 3600.0)
    server.answer = lambda chunk: b"-LOADING\r\n"
    async with connected(server.port, seconds=60.0) as connection, asyncio.timeout(20):
        with refused("store_unavailable"):
            await connection.send("GET")


async def test_an_outage_is_as_long_as_it_is_although_it_is_logged_again(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(server.port) as connection:
        now = asyncio.get_running_loop().time()
        for seconds in (3000.0, 2000.0, 1000.0):
            connection._log_outage(OSError("no route"), now - seconds)
        assert await connection.send("GET") == b"OK"
        assert await connection.send("GET") == b"OK"
    *reached, back = caplog.messages
    assert reached == ["Redis can't be reached: no route"] * 3
    assert 3000.0 <= float(back.removeprefix("Redis is back after ").removesuffix(" s")) < 3100.0


async def test_an_unexpected_error_has_an_unknown_outcome(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(server.port) as connection:
        with pytest.raises(UnknownOutcomeError), connection.translated_errors():
            raise KeyError("reply")
        with refused("invalid_parameter"), connection.translated_errors():
            raise PomeloError("invalid_parameter")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_transport_that_was_closed_meanwhile_is_an_outage_and_no_error_of_pomelo(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(server.port, seconds=0.05) as connection:
        failed = asyncio.get_running_loop().create_future()
        failed.set_exception(RuntimeError("unable to perform operation; the handler is closed"))
        connection._client.execute_command = lambda *command: failed  # type: ignore[method-assign]
        with pytest.raises(UnknownOutcomeError):
            await connection.send("GET")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_the_replies_to_what_was_sent_before_a_server_became_a_replica_are_received(
    server: FakeServer,
) -> None:
    answers = iter([b"-READONLY You can't write\r\n"])
    server.answer = lambda chunk: next(answers, b"+new\r\n")
    async with connected(server.port) as connection:
        calls = [asyncio.create_task(connection.send("GET")) for _ in range(2)]
        assert await calls[0] == b"new"
        assert not calls[1].done()
        server.writers[0].write(b"+old\r\n")
        assert await calls[1] == b"old"
        assert server.connections == 2


async def test_closing_waits_until_the_connection_is_closed(server: FakeServer) -> None:
    async with connected(server.port) as connection:
        await connection.send("GET")
        client = connection._client
        assert isinstance(client, SingleServer)
        link = client._link
        assert link is not None
        assert not link.lost.done()
    assert link.lost.done()
