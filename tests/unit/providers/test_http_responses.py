"""What is a response, what is refused, and that packet boundaries never matter."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomelo.errors import PomeloError
from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.protocol import (
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    NO_LIMIT,
    Connection,
    Origin,
)
from tests.unit.providers.raw_server import CHAT, OK, Peer, Wire, outcome, raw_server, sends, streamed

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BAD, CUT = "provider_failed", "provider_failed"

RESPONSES: dict[str, tuple[bytes, bytes | str]] = {
    "a length": (HEAD + b"Content-Length: 4\r\n\r\nbody", b"body"),
    "no body": (HEAD + b"Content-Length: 0\r\n\r\n", b""),
    "chunks": (CHUNKED + b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n", b"body"),
    "chunks with extensions and trailers": (
        CHUNKED + b'2;a="b"\r\nbo\r\n2 \r\ndy\r\n0\r\nX: y\r\n\r\n',
        b"body",
    ),
    "the end of the connection": (HEAD + b"\r\nbody", b"body"),
    "an encoding and the end of the connection": (HEAD + b"Transfer-Encoding: gzip\r\n\r\nbody", b"body"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "300": (b"HTTP/1.1 300 Multiple Choices\r\nContent-Length: 2\r\n\r\n{}", BAD),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    "interim responses": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK,
        b"{}",
    ),
    "an interim response with a length": (
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 9\r\n\r\n" + HEAD + b"\r\nbody",
        b"body",
    ),
    "an interim response with chunks": (
        b"HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n" + HEAD + b"\r\nbody",
        b"body",
    ),
    "line feeds alone": (b"HTTP/1.1 200 OK\nContent-Length: 4\n\nbody", b"body"),
    "as many fields as are allowed": (
        HEAD + b"X: y\r\n" * (MAX_FIELDS - 1) + b"Content-Length: 4\r\n\r\nbody",
        b"body",
    ),
    "a field as large as is allowed": (
        HEAD + b"X: " + b"y" * MAX_FIELD_BYTES + b"\r\nContent-Length: 4\r\n\r\nbody",
        b"body",
    ),
    "more than was asked for": (OK + b"x", b"{}"),
    "two responses": (OK + OK, b"{}"),
    "nothing": (b"", "provider_unavailable"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", "provider_failed"),
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00" * 3, BAD),
    "a page without a head": (b"<html></html>\r\n\r\n", BAD),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", BAD),
    "status 099": (b"HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n", BAD),
    "status 101": (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n{}", BAD),
    "status 101 without its fields": (b"HTTP/1.1 101 Switching\r\n\r\n{}", BAD),
    "contradicting lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x", BAD),
    "the same length twice": (HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", BAD),
    "a list of lengths": (HEAD + b"Content-Length: 2, 2\r\n\r\n{}", BAD),
    "a negative length": (HEAD + b"Content-Length: -2\r\n\r\n{}", BAD),
    "an immense length": (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}", BAD),
    "a length and chunks": (
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        BAD,
    ),
    "chunks and a length": (
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        BAD,
    ),
    "a folded field": (HEAD + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}", BAD),
    "a field without a colon": (HEAD + b"X\r\nContent-Length: 2\r\n\r\n{}", BAD),
    "a space before the colon": (HEAD + b"Content-Length : 2\r\n\r\n{}", BAD),
    "NUL in a field": (HEAD + b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}", BAD),
    "too many fields": (HEAD + b"X: y\r\n" * (MAX_FIELDS + 1) + b"\r\n{}", BAD),
    "a field that is too large": (HEAD + b"X: " + b"y" * (MAX_FIELD_BYTES + 1) + b"\r\n\r\n{}", BAD),
    "a head that is too large": (HEAD + (b"X: " + b"y" * 8000 + b"\r\n") * 9 + b"\r\n{}", BAD),
    "an endless field": (HEAD + b"X: " + b"y" * 3 * MAX_HEAD_BYTES, BAD),
    "an endless reason": (b"HTTP/1.1 200 " + b"y" * 3 * MAX_HEAD_BYTES, BAD),
    "endless interim responses": (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, BAD),
    "a cut length": (HEAD + b"Content-Length: 5\r\n\r\nbody", CUT),
    "cut chunks": (CHUNKED + b"2\r\nbo\r\n2\r\ndy\r\n", CUT),
    "a cut chunk": (CHUNKED + b"4\r\nbo", CUT),
    "cut chunks, and a space in the head": (
        HEAD + b"Transfer-Encoding: chunked \r\n\r\n2\r\nbo\r\n",
        CUT,
    ),
    "an invalid size of a chunk": (CHUNKED + b"2\r\nbo\r\nx\r\ndy\r\n0\r\n\r\n", CUT),
    "a chunk longer than its size": (CHUNKED + b"2\r\nbody\r\n0\r\n\r\n", CUT),
    "an immense chunk": (CHUNKED + b"fffffffffffffffffff\r\nbody", CUT),
    "an endless extension": (CHUNKED + b"2;x=" + b"y" * 3 * MAX_HEAD_BYTES, CUT),
    "endless trailers": (CHUNKED + b"0\r\n" + b"X: y\r\n" * MAX_HEAD_BYTES, CUT),
}


@pytest.mark.parametrize("name", RESPONSES)
async def test_a_response_is_read_or_refused(http: Http, name: str) -> None:
    response, expected = RESPONSES[name]
    async with raw_server(sends(response)) as server:
        assert await outcome(http, server.url) == expected
        assert await streamed(http, server.url) == expected


async def received(packets: Sequence[bytes], limit: int) -> tuple[Any, ...]:
    """What a client makes of a response in these packets, after which the connection ends."""
    wire = Wire()
    connection = Connection(asyncio.get_running_loop(), Origin("x", 1, False), lambda _: None, keep=True)
    connection.connection_made(wire)
    task = asyncio.create_task(connection.request(b"", None, 60, limit))
    await asyncio.sleep(0)
    for packet in packets:
        if not wire.closing:
            connection.data_received(packet)
    reusable = connection.complete and not wire.closing
    if not wire.closing:
        connection.eof_received()
    connection.connection_lost(None)
    await asyncio.wait([task])
    if error := task.exception():
        return (type(error),)
    body = connection.take()
    return (
        connection.status,
        dict(connection.headers),
        body,
        connection.complete,
        type(connection.error),
        reusable,
    )


SMALL = {name: response for name, (response, _) in RESPONSES.items() if len(response) < 300}


@pytest.mark.parametrize("limit", [NO_LIMIT, 1000])
@pytest.mark.parametrize("name", SMALL)
async def test_a_response_in_any_two_packets_or_in_single_bytes_is_the_same(name: str, limit: int) -> None:
    response = SMALL[name]
    whole = await received([response], limit)
    for cut in range(1, len(response)):
        assert await received([response[:cut], response[cut:]], limit) == whole, response[:cut]
    assert await received([response[at : at + 1] for at in range(len(response))], limit) == whole


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(SMALL)), cuts=st.sets(st.integers(1, 250), max_size=20))
def test_a_response_in_any_packets_is_the_same(name: str, cuts: set[int]) -> None:
    response = SMALL[name]
    edges = [0, *sorted(cut for cut in cuts if cut < len(response)), len(response)]
    packets = [response[start:end] for start, end in pairwise(edges)]

    async def compare() -> None:
        assert await received(packets, NO_LIMIT) == await received([response], NO_LIMIT)

    asyncio.run(compare())


@pytest.mark.parametrize(
    "length", [b"Content-Length: 2000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n"]
)
async def test_a_body_above_the_limit_is_refused(http: Http, length: bytes) -> None:
    response = HEAD + length + b"x" * 2000
    if b"chunked" in length:
        response += b"\r\n0\r\n\r\n"
    async with raw_server(sends(response)) as server:
        assert await outcome(http, server.url, max_bytes=1999) == "provider_failed"
        assert await outcome(http, server.url, max_bytes=2000) == b"x" * 2000


async def test_a_length_above_the_limit_is_refused_before_the_body_arrives(http: Http) -> None:
    async with raw_server(sends(HEAD + b"Content-Length: 2000\r\n\r\n", close=False)) as server:
        async with asyncio.timeout(20):
            assert await outcome(http, server.url, max_bytes=1999) == "provider_failed"
            assert await server.peers[0].left()


async def test_what_arrived_before_a_failure_is_read_first(http: Http) -> None:
    async with (
        raw_server(sends(CHUNKED + b"2\r\nbo\r\n2\r\ndy\r\nnonsense")) as server,
        http.stream_bytes(server.url, {}, b"{}", CHAT) as body,
    ):
        assert await body.read(3) + await body.read() == b"body"
        for _ in range(2):
            with pytest.raises(PomeloError):
                await body.read()


async def test_the_fields_of_a_response_are_found_in_any_case_and_never_in_trailers_or_interim_responses(
    http: Http,
) -> None:
    response = b"HTTP/1.1 103 Early Hints\r\nContent-Type: text/html\r\nLink: x\r\n\r\n" + HEAD
    response += b"content-TYPE: audio/mpeg; x=\xc3\xa9\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with (
        raw_server(sends(response + b"2\r\n{}\r\n0\r\nX-Evil: 1\r\n\r\n")) as server,
        http.stream_bytes(server.url, {}, b"{}", CHAT) as body,
    ):
        assert await body.read() == b"{}"
        assert await body.read() == b""
        assert body.headers.get("Content-Type") == "audio/mpeg; x=é"
        assert "X-Evil" not in body.headers
        assert "Link" not in body.headers


@pytest.mark.parametrize("limits", [Timeouts(silence=0.1, whole=9), Timeouts(silence=9, whole=0.1)])
@pytest.mark.parametrize("response", [b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{}", CHUNKED + b"2\r\n"])
async def test_silence_ends_a_response_and_closes_the_connection(limits: Timeouts, response: bytes) -> None:
    ask = streamed if limits.silence < 1 else outcome
    async with raw_server(sends(response, close=False)) as server, Http(limits) as http:
        assert await ask(http, server.url) == "deadline_exceeded"
        assert await server.peers[0].left()


async def test_a_response_that_progresses_is_not_silent() -> None:
    async def drip(peer: Peer) -> None:
        await peer.request()
        for part in (
            b"HTTP/1.1 100 Continue\r\n\r\n",
            HEAD,
            b"Content-Length: 4\r\n\r\n",
            b"b",
            b"o",
            b"d",
            b"y",
        ):
            peer.writer.write(part)
            await asyncio.sleep(0.3)

    # In all it takes longer than it may be silent.
    async with raw_server(drip) as server, Http(Timeouts(silence=1.6, whole=1.6)) as http:
        assert set(await asyncio.gather(outcome(http, server.url), streamed(http, server.url))) == {b"body"}


async def test_silence_after_progress_ends_a_whole_response() -> None:
    async def drip(peer: Peer) -> None:
        await peer.request()
        peer.writer.write(HEAD + b"Content-Length: 9\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(0.05)
            peer.writer.write(b"x")
        await peer.reader.read()

    async with raw_server(drip) as server, Http(Timeouts(whole=0.2)) as http, asyncio.timeout(20):
        assert await outcome(http, server.url) == "deadline_exceeded"
        assert await server.peers[0].left()


@pytest.mark.parametrize("lines", [False, True], ids=["events", "lines"])
async def test_a_patient_stream_may_begin_late_but_not_be_silent_as_long_afterwards(lines: bool) -> None:
    async def answer(peer: Peer) -> None:
        await peer.request()
        for piece in (HEAD + b"Content-Length: 99\r\n\r\n", b"data: 1\n\n"):
            await asyncio.sleep(0.2)
            peer.writer.write(piece)
        await peer.reader.read()

    async with raw_server(answer) as server, Http(Timeouts(silence=0.1, whole=60)) as http:
        async with (
            asyncio.timeout(20),
            http.stream_events(server.url, {}, b"{}", CHAT, patient=True, lines=lines) as events,
        ):
            assert await events.read()
            with pytest.raises(UpstreamError) as failure:
                await events.read()
        assert failure.value.code == "deadline_exceeded"
        assert await server.peers[0].left()


async def test_a_patient_stream_of_bytes_may_be_silent_as_long_as_a_whole_response() -> None:
    async def answer(peer: Peer) -> None:
        await peer.request()
        for piece in (HEAD + b"Content-Length: 4\r\n\r\n", b"bo", b"dy"):
            await asyncio.sleep(0.2)
            peer.writer.write(piece)
            await peer.writer.drain()

    async with (
        raw_server(answer) as server,
        Http(Timeouts(silence=0.1, whole=60)) as http,
        http.stream_bytes(server.url, {}, b"{}", CHAT, patient=True) as body,
    ):
        assert await body.read_all(99) == b"body"
        assert body.ended


async def test_a_kept_connection_obeys_the_shorter_silence_of_a_later_request() -> None:
    async with (
        raw_server(sends(OK, b"", close=False)) as server,
        Http(Timeouts(silence=0.1, whole=60)) as http,
    ):
        await http.request_json(server.url, {}, b"{}", CHAT)
        async with asyncio.timeout(20):
            with pytest.raises(PomeloError) as failure:
                async with http.stream_bytes(server.url, {}, b"{}", CHAT):
                    pass
        assert failure.value.code == "deadline_exceeded"
        assert len(server.peers) == 1


async def test_an_unread_stream_stops_the_server(http: Http) -> None:
    sent = 0

    async def flood(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        peer.writer.write(HEAD + b"\r\n")
        while True:
            peer.writer.write(b"x" * 65536)
            await peer.writer.drain()
            sent += 65536

    async with raw_server(flood) as server:
        async with http.stream_bytes(server.url, {}, b"{}", CHAT) as body:
            await body.read()
            await asyncio.sleep(0.3)
            stopped = sent
            await asyncio.sleep(0.3)
            assert sent == stopped < 32 * 1024 * 1024
            read = 0
            while read < stopped + 1024 * 1024:
                read += len(await body.read())
            assert sent > stopped
        assert await server.peers[0].left()
