"""The connection to Redis that all callers share, in front of servers that misbehave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.ledger import UnknownOutcomeError
from pomelo.stores.redis.client import SingleServer
from pomelo.stores.redis.connection import Connection, Timing
from pomelo.stores.redis.link import Login, open_link
from tests.faults.waiting import until
from tests.ports import free_port
from tests.redis_server import RedisServer

ATTEMPT = 0.2
"""Seconds that a server may be silent."""
LATE = 2.0
"""Tolerance for a busy machine, in seconds."""


class FakeServer:
    """Answers with what `answer` makes of each chunk that arrives; None closes the connection."""

    def __init__(self) -> None:
        self.answer: Callable[[bytes], bytes | None] = lambda chunk: b"+OK\r\n" * chunk.count(b"GET")
        self.chunks: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.port = 0

    @property
    def connections(self) -> int:
        return len(self.writers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        while chunk := await reader.read(1 << 16):
            self.chunks.append(chunk)
            answer = self.answer(chunk)
            if answer is None:
                break
            writer.write(answer)
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    listening = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield fake


@asynccontextmanager
async def connected(
    port: int, seconds: float = 5.0, *, db: int = 0, password: str | None = None
) -> AsyncIterator[Connection]:
    login = Login(ATTEMPT, password=password, db=db)
    client = SingleServer(partial(open_link, ("127.0.0.1", port), login))
    connection = Connection(client, Timing(timeout=seconds, attempt_timeout=ATTEMPT))
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
        assert server.connections == 1


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


async def test_commands_in_flight_on_a_broken_connection_have_an_unknown_outcome(server: FakeServer) -> None:
    server.answer = lambda chunk: None
    async with connected(server.port, seconds=0.1) as connection:
        calls = [connection.send("GET") for _ in range(20)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in found} == {UnknownOutcomeError}


async def test_commands_that_were_never_sent_are_known_to_have_failed() -> None:
    async with connected(free_port(), seconds=1.0) as connection:
        found = await asyncio.gather(*[connection.send("GET") for _ in range(20)], return_exceptions=True)
        assert {type(error) for error in found} == {PomeloError}


@pytest.mark.parametrize("login", ["AUTH", "SELECT"])
async def test_commands_are_not_sent_if_the_login_fails(server: FakeServer, login: str) -> None:
    server.answer = lambda chunk: b"-ERR no\r\n" * chunk.count(login.encode())
    options = {"AUTH": {"password": "p"}, "SELECT": {"db": 3}}[login]
    async with connected(server.port, seconds=1.0, **options) as connection:  # type: ignore[arg-type]
        with pytest.raises(PomeloError) as caught:
            await connection.send("GET")
        assert type(caught.value) is PomeloError
        assert b"GET" not in b"".join(server.chunks)


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


async def test_a_silent_server_is_given_up_after_the_timeout_of_an_attempt(server: FakeServer) -> None:
    server.answer = lambda chunk: b""
    async with connected(server.port) as connection:
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
    server.answer = lambda chunk: b"$1000\r\n"
    async with connected(server.port, seconds=3 * ATTEMPT) as connection:
        begun = time.monotonic()
        pending = asyncio.create_task(connection.send("GET"))
        while not pending.done():
            await asyncio.sleep(ATTEMPT / 10)
            for writer in server.writers:
                writer.write(b"x")
        with pytest.raises(UnknownOutcomeError):
            await pending
        assert 2 * ATTEMPT < time.monotonic() - begun < 3 * ATTEMPT + LATE
        assert server.connections == 1


async def test_replies_are_decoded_as_by_redis_py() -> None:
    with RedisServer() as redis:
        async with connected(redis.port, db=2) as connection:
            assert await connection.send("HSET", "a", "b", 1, "c", "d") == 2
            assert await connection.send("HGETALL", "a") == {b"b": b"1", b"c": b"d"}
            assert await connection.send("HSCAN", "a", 0) == (0, {b"b": b"1", b"c": b"d"})
        assert redis.do("DBSIZE") == 0
