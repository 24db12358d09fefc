"""The connection to Redis that all callers share, in front of servers that misbehave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
from redis import exceptions as errors
from redis.asyncio import Redis

from pomelo.errors import PomeloError
from pomelo.stores.ledger import UnknownOutcomeError
from pomelo.stores.redis import connection
from pomelo.stores.redis.client import Cluster, SingleServer
from pomelo.stores.redis.connection import (
    Connection,
    NotSentError,
    RefusedError,
    Timing,
    _may_be_executed,
    scan,
)
from pomelo.stores.redis.link import Link, Login, open_link
from tests.ports import free_port
from tests.redis_server import RedisServer
from tests.unit.stores.fake_redis import FakeServer
from tests.waiting import until

ATTEMPT = 0.2
"""Seconds that a server may be silent."""
LATE = 2.0
"""Tolerance for a busy machine, in seconds."""


@asynccontextmanager
async def connected(
    port: int, seconds: float = 5.0, *, attempt: float = LATE, db: int = 0, password: str | None = None
) -> AsyncIterator[Connection]:
    login = Login(attempt, password=password, db=db)
    client = SingleServer(partial(open_link, ("127.0.0.1", port), login))
    connection = Connection(client, Timing(timeout=seconds, attempt_timeout=attempt))
    try:
        yield connection
    finally:
        await connection.close()


async def test_commands_of_one_turn_of_the_event_loop_are_one_write(server: FakeServer) -> None:
    async with connected(server.port) as connection:
        await connection.send("GET")
        server.chunks.clear()
        assert await asyncio.gather(*[connection.send("GET") for _ in range(50)]) == [b"OK"] * 50
        assert [chunk.count(b"GET") for chunk in server.chunks] == [50]
        assert (server.connections, server.ended) == (1, 0)
    await until(lambda: server.ended == 1)


async def test_a_command_does_not_wait_for_the_replies_of_earlier_ones(server: FakeServer) -> None:
    async with connected(server.port) as connection:
        server.answer = lambda chunk: b""
        first = asyncio.create_task(connection.send("GET"))
        await until(lambda: len(server.chunks) == 1)
        server.answer = lambda chunk: b"+first\r\n+second\r\n"
        assert await connection.send("GET") == b"second"
        assert await first == b"first"


async def test_a_reply_that_comes_in_parts_is_one_reply(server: FakeServer) -> None:
    async with connected(server.port) as connection:
        parts = iter([b"$10\r\n01234", b"56789\r\n+O", b"K\r\n"])
        server.answer = lambda chunk: next(parts)
        replies = [asyncio.create_task(connection.send("GET")) for _ in range(2)]
        for number in range(1, 4):
            await until(lambda: len(server.chunks) == number)  # noqa: B023 (awaited here)
            if number < 3:
                replies.append(asyncio.create_task(connection.send("ECHO")))
        assert await asyncio.gather(*replies[:2]) == [b"0123456789", b"OK"]
        for reply in replies[2:]:
            reply.cancel()


async def test_a_reset_repeats_all_commands_in_flight(server: FakeServer) -> None:
    broken = iter([None])
    server.answer = lambda chunk: next(broken, b"+OK\r\n" * chunk.count(b"GET"))
    async with connected(server.port) as connection:
        assert await asyncio.gather(*[connection.send("GET") for _ in range(50)]) == [b"OK"] * 50
        assert server.connections == 2


async def test_the_waits_for_a_busy_server_are_bounded(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_WAIT_INITIAL", 0.001)
    monkeypatch.setattr(connection, "_WAIT_MAX", 0.002)
    busy = iter([b"-LOADING\r\n"] * 20)
    server.answer = lambda chunk: next(busy, b"+OK\r\n")
    async with connected(server.port, seconds=60.0) as opened:
        assert await opened.send("GET") == b"OK"  # the last of unbounded waits would take 9 minutes


async def test_commands_in_flight_on_a_broken_connection_have_an_unknown_outcome(server: FakeServer) -> None:
    server.answer = lambda chunk: None
    async with connected(server.port, seconds=0.5) as connection:
        calls = [connection.send("GET") for _ in range(20)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in found} == {UnknownOutcomeError}


async def test_a_blocked_event_loop_is_no_outage(server: FakeServer) -> None:
    async with connected(server.port, seconds=0.1) as connection:
        await connection.send("GET")
        for tries in range(20):  # the machine may suspend this process, too
            command = asyncio.create_task(connection.send("GET"))
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251 (blocks the event loop)
            try:
                assert await command == b"OK"
                break
            except UnknownOutcomeError:
                assert tries < 19


async def test_commands_that_were_never_sent_are_known_to_have_failed() -> None:
    async with connected(free_port(), seconds=1.0) as connection:
        found = await asyncio.gather(*[connection.send("GET") for _ in range(20)], return_exceptions=True)
        assert {type(error) for error in found} == {PomeloError}


async def test_a_command_was_not_executed_if_redis_py_could_not_connect() -> None:
    client = Redis(port=free_port())  # as the client of a cluster does for each node
    with pytest.raises(errors.ConnectionError) as caught:
        await client.ping()
    assert not _may_be_executed(caught.value)
    assert _may_be_executed(errors.ConnectionError("Connection closed by server."))


@pytest.mark.parametrize("login", ["AUTH", "SELECT"])
async def test_commands_are_not_sent_if_the_login_fails(server: FakeServer, login: str) -> None:
    server.answer = lambda chunk: b"-ERR no\r\n" * chunk.count(login.encode())
    options = {"AUTH": {"password": "p"}, "SELECT": {"db": 3}}[login]
    async with connected(server.port, seconds=1.0, **options) as connection:  # type: ignore[arg-type]
        with pytest.raises(PomeloError) as caught:
            await connection.send("GET")
        assert type(caught.value) is PomeloError
        assert b"GET" not in b"".join(server.chunks)
        await until(lambda: server.ended == server.connections)


@pytest.mark.parametrize(
    "garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n+OK\r\n"], ids=["bytes", "replies"]
)
async def test_a_connection_with_garbage_is_replaced(server: FakeServer, garbage: bytes) -> None:
    answers = iter([garbage])
    server.answer = lambda chunk: next(answers, b"+OK\r\n" * chunk.count(b"GET"))
    async with connected(server.port) as connection:
        assert await connection.send("GET") == b"OK"
        assert await connection.send("GET") == b"OK"
        assert server.connections == 2


async def test_a_command_whose_reply_can_not_be_decoded_is_repeated(server: FakeServer) -> None:
    answers = iter([b":5\r\n"])
    server.answer = lambda chunk: next(answers, b"*2\r\n$1\r\na\r\n$1\r\nb\r\n")
    async with connected(server.port) as connection:
        begun = time.monotonic()
        assert await connection.send("HGETALL", "key") == {b"a": b"b"}
        assert time.monotonic() - begun < LATE
        assert server.connections == 2


REDIS_6_2 = "ERR Error running script (call to f_1): @user_script:3: @user_script: 3: -READONLY a replica"


@pytest.mark.parametrize("error", ["LOADING", "READONLY", REDIS_6_2, "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN"])
async def test_a_command_that_a_server_can_not_do_yet_is_repeated(server: FakeServer, error: str) -> None:
    answers = iter([f"-{error} for a while\r\n".encode()] * 2)
    server.answer = lambda chunk: next(answers, b"+OK\r\n")
    async with connected(server.port) as connection:
        assert await connection.send("GET") == b"OK"
        # A server that has become a replica is left, as its name may lead to a different one now.
        assert server.connections == (3 if "READONLY" in error else 1)
        await until(lambda: server.ended == server.connections - 1)


@pytest.mark.parametrize("error", ["LOADING", "READONLY"])
async def test_a_command_that_a_server_did_not_do_is_known_to_have_failed(
    server: FakeServer, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last attempt is after 1.3 s, so that its reply is not late, however busy the machine is.
    monkeypatch.setattr("pomelo.stores.redis.connection._WAIT_MAX", 20.0)
    server.answer = lambda chunk: f"-{error} for long\r\n".encode() * chunk.count(b"GET")
    async with connected(server.port, seconds=2.5) as connection:
        with pytest.raises(PomeloError) as caught:
            await connection.send("GET")
        assert type(caught.value) is PomeloError


async def test_a_command_that_a_server_refuses_is_not_repeated(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([b"-ERR no\r\n", None, b"-ERR no\r\n"])
    server.answer = lambda chunk: next(answers)
    async with connected(server.port) as connection:
        for error in (RefusedError, UnknownOutcomeError):  # the second one was sent before
            with pytest.raises(PomeloError) as caught:
                await connection.send("GET")
            assert type(caught.value) is error
        assert len(server.chunks) == 3
    assert [each.getMessage() for each in caplog.records] == ["Redis refused a command: no"] * 2


async def test_a_command_that_was_sent_once_has_an_unknown_outcome_whatever_follows() -> None:
    fake = FakeServer()
    listening = await asyncio.start_server(fake.serve, "127.0.0.1", 0)

    def close(chunk: bytes) -> None:
        listening.close()

    fake.answer = close
    async with connected(listening.sockets[0].getsockname()[1], seconds=1.0) as connection:
        with pytest.raises(UnknownOutcomeError):
            await connection.send("GET")
        assert len(fake.chunks) == 1


async def test_an_outage_and_its_end_are_logged_once(
    server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.stores.redis.connection._LOG_INTERVAL", 3600.0)
    server.answer = lambda chunk: None
    async with connected(server.port, seconds=0.05) as connection:
        for _ in range(2):
            with pytest.raises(PomeloError):
                await connection.send("GET")
        with connection.one_deadline(30.0):
            server.answer = lambda chunk: b"+OK\r\n" * chunk.count(b"GET")
            for _ in range(2):
                assert await connection.send("GET") == b"OK"
    lost, back = [each.getMessage() for each in caplog.records]
    assert lost.startswith("Redis can't be reached: ")
    assert back.startswith("Redis is back after ")


async def test_a_closed_connection_repeats_nothing(server: FakeServer) -> None:
    server.answer = lambda chunk: b""
    async with connected(server.port, seconds=30.0) as connection:
        running = [asyncio.create_task(connection.send("GET")) for _ in range(3)]
        await until(lambda: len(server.chunks) == 1)
        await connection.close()
        async with asyncio.timeout(20):  # long before the deadline
            for call in running:
                with pytest.raises(UnknownOutcomeError):
                    await call
            with pytest.raises(PomeloError) as caught:
                await connection.send("GET")
        assert type(caught.value) is PomeloError
        assert (len(server.chunks), server.connections) == (1, 1)


async def test_a_closed_client_fails_the_commands_that_wait_for_a_connection() -> None:
    connecting = asyncio.Event()

    async def connect() -> Link:
        connecting.set()
        await asyncio.Event().wait()
        raise AssertionError

    client = SingleServer(connect)
    waiting = client.execute_command("GET")
    await connecting.wait()
    await client.aclose()
    async with asyncio.timeout(20):
        with pytest.raises(NotSentError, match="closed"):
            await waiting
        with pytest.raises(NotSentError, match="closed"):
            await client.execute_command("GET")


async def test_a_call_in_another_has_its_deadline(server: FakeServer) -> None:
    server.answer = lambda chunk: b""
    async with connected(server.port, seconds=30.0) as connection:
        with (
            connection.one_deadline(0.05),
            connection.one_deadline(30.0),
            pytest.raises(UnknownOutcomeError),
        ):
            await connection.send("GET")
        server.answer = lambda chunk: b"+OK\r\n" * chunk.count(b"GET")
        assert await connection.send("GET") == b"OK"


async def test_each_page_of_a_scan_after_the_first_has_more_time_than_a_call(server: FakeServer) -> None:
    async with connected(server.port) as connection:
        later = iter([None, b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nb\r\n"])

        def answer(chunk: bytes) -> bytes | None:
            if b"$1\r\n0\r\n" not in chunk:
                return next(later)
            connection.timing = replace(connection.timing, timeout=0.001)
            return b"*2\r\n$1\r\n7\r\n*1\r\n$1\r\na\r\n"

        server.answer = answer
        assert [page async for page in scan(connection, "SSCAN", "names")] == [[b"a"], [b"b"]]


async def test_a_command_whose_caller_has_left_is_not_sent(server: FakeServer) -> None:
    async with connected(server.port) as connection:
        left = asyncio.create_task(connection.send("GET", "left"))
        await asyncio.sleep(0)
        left.cancel()
        assert await connection.send("GET", "stays") == b"OK"
        assert b"left" not in b"".join(server.chunks)


async def test_a_silent_server_is_given_up_after_the_timeout_of_an_attempt(server: FakeServer) -> None:
    server.answer = lambda chunk: b""
    async with connected(server.port, attempt=ATTEMPT) as connection:
        pending = asyncio.create_task(connection.send("GET"))
        await until(lambda: len(server.chunks) == 1)
        begun = time.monotonic()
        server.answer = lambda chunk: b"+OK\r\n"
        assert await pending == b"OK"
        assert 0.5 * ATTEMPT < time.monotonic() - begun < ATTEMPT + LATE
        assert server.connections == 2
        # A server that owes nothing may be silent.
        await asyncio.sleep(ATTEMPT * 1.5)
        assert await connection.send("GET") == b"OK"
        assert server.connections == 2


async def test_a_call_ends_at_its_deadline_although_the_server_is_not_silent(server: FakeServer) -> None:
    attempt = 5 * ATTEMPT  # the server must be reached within it, on a busy machine too
    server.answer = lambda chunk: b"$1000\r\n"
    async with connected(server.port, 3 * attempt, attempt=attempt) as connection:
        begun = time.monotonic()
        pending = asyncio.create_task(connection.send("GET"))
        while not pending.done():
            await asyncio.sleep(ATTEMPT / 10)
            for writer in server.writers:
                writer.write(b"x")
        with pytest.raises(UnknownOutcomeError):
            await pending
        assert 2 * attempt < time.monotonic() - begun < 3 * attempt + LATE
        assert server.connections == 1


async def test_replies_are_decoded_as_by_redis_py() -> None:
    with RedisServer() as redis:
        async with connected(redis.port, db=2) as connection:
            assert await connection.send("HSET", "a", "b", 1, "c", "d") == 2
            assert await connection.send("HGETALL", "a") == {b"b": b"1", b"c": b"d"}
            assert await connection.send("HSCAN", "a", 0) == (0, {b"b": b"1", b"c": b"d"})
        assert redis.do("DBSIZE") == 0


class Node:
    """The client of a cluster, whose commands end when a test says so."""

    def __init__(self) -> None:
        self.commands: list[tuple[object, ...]] = []
        self.free = asyncio.Event()

    def get_node_from_key(self, key: str) -> None: ...

    async def execute_command(self, *command: object) -> object:
        self.commands.append(command)
        await self.free.wait()
        return command[0]


async def test_a_cluster_does_not_get_the_command_of_a_caller_who_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pomelo.stores.redis.client._MAX_CONCURRENT", 1)
    node = Node()
    cluster = Cluster(node)  # type: ignore[arg-type]
    first, left, last = (cluster.execute_command(name, "key") for name in ("first", "left", "last"))
    await until(lambda: node.commands == [("first", "key")])
    left.cancel()
    node.free.set()
    assert [await first, await last] == ["first", "last"]
    assert node.commands == [("first", "key"), ("last", "key")]
    await until(lambda: not cluster._running)
