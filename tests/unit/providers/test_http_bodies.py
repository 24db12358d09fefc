"""Bodies of requests to vendors: large ones, those that the vendor does not read, and early responses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pomelo.providers.errors import UpstreamError
from pomelo.providers.http import protocol
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.protocol import Connection, Origin
from tests.unit.loop import iterations, watched
from tests.unit.providers.raw_server import CHAT, OK, PAID, Peer, Wire, raw_server, sends


async def test_other_calls_run_while_a_large_body_is_sent(http: Http) -> None:
    async with raw_server(sends(OK)) as server, watched() as turns:
        await http.request_json(server.url, {}, b"x" * 3_000_000, CHAT)
    assert len(turns) > 3_000_000 // 65536


async def test_a_body_that_the_server_does_not_read_is_silence() -> None:
    async def answer(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(60)

    async with raw_server(answer) as server, Http(Timeouts(whole=0.2)) as http:
        async with asyncio.timeout(20):
            with pytest.raises(UpstreamError) as failure:
                await http.request_json(server.url, {}, b"x" * 30_000_000, PAID)
    assert failure.value.code == "deadline_exceeded"


class Clocked:
    """The running loop with a clock that a test sets, and the last timer that was started."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.now = self.due = 0.0
        self.fire: Callable[[], None] = lambda: None

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        self.due, self.fire = self.now + delay, callback
        return SimpleNamespace(cancel=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


async def test_only_a_body_of_which_nothing_more_is_sent_is_silence() -> None:
    loop: Any = Clocked()
    connection = Connection(loop, Origin("x", 1, False), lambda _: None, keep=True)
    connection.connection_made(Wire())
    connection.pause_writing()
    sending = asyncio.create_task(connection.request(b"", b"x" * 3_000_000, silence=10.0))
    await iterations()
    for _ in range(5):  # the server reads a part every nine seconds
        loop.now += 9.0
        connection.resume_writing()
        connection.pause_writing()
        await iterations()
        if loop.now >= loop.due:
            loop.fire()
        assert not sending.done()
    loop.now += 10.0
    loop.fire()
    with pytest.raises(TimeoutError):
        await sending
    connection.connection_lost(None)


async def test_a_stream_whose_reader_is_late_is_read_again_once_the_reader_took_what_arrived() -> None:
    wire = Wire()
    loop = asyncio.get_running_loop()
    connection = Connection(loop, Origin("x", 1, False), lambda _: None, keep=True)
    connection.connection_made(wire)
    asking = asyncio.create_task(connection.request(b"", None, silence=10.0))
    await iterations()
    connection.data_received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    await asking
    for _ in range(3):
        assert not wire.paused  # a reader that takes each packet in time costs no system call
        connection.data_received(b"1\r\nb\r\n")
        assert wire.paused
        connection.take(1)
        assert not wire.paused
        connection.take()
        connection.data_received(b"1\r\na\r\n")
    connection.data_received(b"0\r\n\r\n")
    assert connection.complete
    assert not wire.paused  # the loss of a kept connection is noticed


async def test_a_refusal_before_the_body_was_read_is_the_outcome_and_closes_the_connection(
    http: Http,
) -> None:
    async def answer(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n{}")
        await peer.reader.read()

    async with raw_server(answer) as server:
        with pytest.raises(UpstreamError) as failure:
            await http.request_json(server.url, {}, b"x" * 30_000_000, CHAT)
        assert failure.value.code == "payload_too_large"
        assert await server.peers[0].left()


async def test_a_connection_with_bytes_that_were_not_sent_is_not_kept(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_MAX_WRITE_BYTES", 50_000_000)  # more than the kernel buffers

    async def answer(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.writer.write(OK)
        await peer.reader.read()

    async with raw_server(answer) as server:
        await http.request_json(server.url, {}, b"x" * 30_000_000, CHAT)
        assert await server.peers[0].left()


async def test_a_response_that_begins_while_the_body_is_sent_does_not_stop_it(http: Http) -> None:
    async def answer(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n")
        peer.writer.write(str(len(await peer.reader.readexactly(3_000_000))).encode())

    async with raw_server(answer) as server:
        assert await http.request_json(server.url, {}, b"x" * 3_000_000, CHAT) == 3_000_000
