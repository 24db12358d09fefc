"""HTTP on one connection: requests one after the other, what the versions differ in, and the end."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from gateway.connections.connection import MAX_HEAD
from gateway.responses import encode_head
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.telemetry.readiness import Readiness
from tests.gateway.flow import open_clients
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import (
    CHUNKED,
    FORM,
    HEALTH,
    HI,
    KEY,
    headers_of,
    raw_get,
    raw_task,
    read_response,
    read_status,
    read_until_closed,
)
from tests.gateway.scripts import ScriptedTasks, play, text_events
from tests.unit.loop import iterations
from tests.waiting import until

TASK = raw_task(HI, close=False)
STREAM = {**HI, "stream": True}
LAST = raw_get("/healthz", "Connection: close")


def model(name: str, *lines: str) -> bytes:
    """A request for a model that does not exist; the response names it."""
    return raw_get(f"/api/v1/models/{name}", f"Authorization: Bearer {KEY}", *lines)


@pytest.mark.parametrize("over", [0, 1])
async def test_a_head_may_have_exactly_the_limit_before_it_is_complete(
    gateway: GatewayApp, over: int
) -> None:
    line = b"A: " + b"x" * 995 + b"\r\n"
    head = b"GET /healthz HTTP/1.1\r\n" + line * 32
    head += b"B: " + b"x" * (MAX_HEAD - len(head) - 3 + over)
    async with open_clients(gateway.services) as clients:
        client = clients.accept()
        client.connection.connection_made(client)
        for at in range(0, len(head), 7_000):
            client.connection.data_received(head[at : at + 7_000])
            await iterations()
        assert client.unread.startswith(b"HTTP/1.1 400 ") is bool(over)
        assert bool(client.unread) is bool(over)


@pytest.mark.parametrize("over", [0, 1])
async def test_a_head_may_have_exactly_the_limit_if_more_arrives_with_it(
    gateway: GatewayApp, over: int
) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + (b"A: " + b"x" * 995 + b"\r\n") * 31
    head += b"B: " + b"x" * (MAX_HEAD - len(head) - 7 + over) + b"\r\n\r\n"
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(head + HEALTH)
        await until(lambda: client.unread)
        assert bytes(client.unread[9:12]) == (b"400" if over else b"200")


async def test_a_head_that_is_too_large_is_refused_also_if_its_body_arrives_before_it_is_handled(
    gateway: GatewayApp,
) -> None:
    go_on = asyncio.Event()
    large = raw_task(HI, *[f"X-{number}: {'x' * 1000}" for number in range(40)])
    async with open_clients(replace(gateway.services, tasks=_whole(go_on.wait))) as clients:
        client = await clients.connect(TASK)
        client.read_everything()
        client.connection.data_received(large[:-1])
        client.connection.data_received(large[-1:])
        go_on.set()
        await until(lambda: client.received.count(b"HTTP/1.") == 2)
        assert re.findall(rb"HTTP/1.\d (\d+)", client.received) == [b"200", b"400"]


@pytest.mark.parametrize("piece", [None, 7, 1000], ids=["in one piece", "by 7 bytes", "by 1,000 bytes"])
async def test_pipelined_requests_are_answered_in_order(gateway: GatewayApp, piece: int | None) -> None:
    sent = b"".join(model(f"m{number}") + TASK + HEALTH for number in range(8)) + LAST
    size = piece or len(sent)
    async with gateway.connect() as (reader, writer), asyncio.timeout(20):
        for at in range(0, len(sent), size):
            writer.write(sent[at : at + size])
            await asyncio.sleep(0)
        received = await reader.read()
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"400", b"200", b"200"] * 8 + [b"200"]
    assert re.findall(rb"task type: (m\d)", received) == [b"m%d" % number for number in range(8)]


@pytest.mark.parametrize("piece", [None, 7, 200], ids=["in one piece", "by 7 bytes", "by 200 bytes"])
@pytest.mark.parametrize("before", [1, 2, 5])
async def test_requests_in_front_of_a_malformed_one_are_answered(
    gateway: GatewayApp, before: int, piece: int | None
) -> None:
    sent = TASK * before + b"  malformed\r\n\r\n"
    size = piece or len(sent)
    async with gateway.connect() as (reader, writer), asyncio.timeout(20):
        for at in range(0, len(sent), size):
            writer.write(sent[at : at + size])
            await asyncio.sleep(0)
        received = await reader.read()
    assert re.findall(rb"HTTP/1.\d (\d+)", received) == [b"200"] * before + [b"400"]


async def test_requests_behind_an_upgrade_that_is_not_made_are_answered(gateway: GatewayApp) -> None:
    asking = model("m0", "Connection: Upgrade", "Upgrade: websocket")
    received = await gateway.exchange(asking + model("m1") + asking + LAST)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"400", b"400", b"400", b"200"]


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "websocket, h2c", "tls/1.0", "websoc\u212aet"])
@pytest.mark.parametrize("field", ["Upgrade", "upgrade"])
async def test_a_request_for_another_protocol_is_answered_and_its_connection_stays(
    gateway: GatewayApp, protocol: str, field: str
) -> None:
    fields = "Connection: Upgrade, HTTP2-Settings", f"{field}: {protocol}", "HTTP2-Settings: AAEAAEAA"
    for asked in (model("m0", *fields), raw_task(HI, *fields, close=False)):
        async with gateway.connect() as (reader, writer):
            for _ in range(2):
                writer.write(asked + TASK)
                for expected in (400 if b"m0" in asked else 200, 200):
                    status, headers, _ = await read_response(reader)
                    assert (status, headers.get("connection")) == (expected, None)


@pytest.mark.parametrize(
    "divided",
    [b"", b"--B", b"\r\n\r\n", b"\r\nUpgrade: h2c\r\n\r\n"],
    ids=["whole", "the body apart", "in the head", "in the body"],
)
async def test_a_body_that_looks_like_a_request_for_another_protocol_is_unchanged(
    gateway: GatewayApp, divided: bytes
) -> None:
    text = "GET / HTTP/1.1\r\nUpgrade: h2c\r\n\r\nUpgrade: h2c"
    fields = {"model": "eleven-labs-tts", "voice": "adam", "text": text}
    parts = "".join(
        f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    sent = raw_task(f"{parts}--B--\r\n".encode(), content_type=FORM, close=False)
    at = sent.index(divided) if divided else len(sent)
    async with gateway.connect(sent[:at]) as (reader, writer):
        assert await gateway.is_healthy()
        writer.write(sent[at:])
        assert await read_status(reader) == 200
    assert gateway.provider.jobs[0].input.text == text


@pytest.mark.parametrize("protocol", ["h2c", "websocket, h2c", "tls/1.0", "websoc\u212aet"])
async def test_a_request_for_another_protocol_whose_head_is_divided_is_the_last_one(
    gateway: GatewayApp, protocol: str
) -> None:
    fields = "Connection: Upgrade", f"Upgrade: {protocol}"
    for asked in (model("m0", *fields), raw_task(HI, *fields, close=False)):
        at = asked.index(b"grade: ")
        async with gateway.connect(asked[:at]) as (reader, writer):
            assert await gateway.is_healthy()
            writer.write(asked[at:] + TASK)
            _, headers, _ = await read_response(reader)
            assert headers["connection"] == "close"
            assert await read_until_closed(reader) == b""


async def test_what_follows_a_connect_request_is_no_request(gateway: GatewayApp) -> None:
    asked = f"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(LAST)}\r\n\r\n".encode() + LAST
    assert (await gateway.exchange(asked)).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("chunks", [2048, 3000], ids=["reading pauses at the end", "reading pauses before"])
async def test_a_body_of_thousands_of_chunks_does_not_stop_the_requests_behind_it(
    gateway: GatewayApp, chunks: int
) -> None:
    body = json.dumps(HI).encode()
    chunked = b"1\r\n \r\n" * chunks + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    half = len(TASK) - len(body) // 2
    async with gateway.connect(raw_task(b"", framing=CHUNKED, close=False) + chunked) as (reader, writer):
        assert await read_status(reader) == 200
        for at in (0, half, half):
            writer.write(TASK[:at])
            assert await gateway.is_healthy()
            writer.write(TASK[at:])
            assert await read_status(reader) == 200


@pytest.mark.parametrize("content_type", ["application/json", FORM])
async def test_a_body_that_becomes_malformed_is_refused_immediately(
    open_gateway: OpenApp, content_type: str
) -> None:
    begun = raw_task(b"", framing=CHUNKED, content_type=content_type, close=False) + b"1\r\n \r\n"
    async with (
        open_gateway(read_grace=60, read_timeout=60) as gateway,
        gateway.connect(begun) as (reader, writer),
    ):
        assert await gateway.is_healthy()
        writer.write(b"no size\r\n")
        status, headers, body = await read_response(reader)
    assert (status, headers["connection"]) == (400, "close")
    assert b"framing is malformed" in body


async def test_a_stream_to_a_client_of_http_1_0_ends_with_its_connection(gateway: GatewayApp) -> None:
    gateway.provider.script = play(*text_events("one"))
    asked = raw_task(STREAM, "Connection: keep-alive", version="1.0", close=False)
    head, _, body = (await gateway.exchange(asked)).partition(b"\r\n\r\n")
    assert b"Connection" not in head
    assert body.endswith(b"data: [DONE]\n\n")


async def test_a_client_of_http_1_0_may_keep_its_connection(gateway: GatewayApp) -> None:
    asked = raw_task(HI, "Connection: keep-alive", version="1.0", close=False)
    async with gateway.connect() as (reader, writer):
        for _ in range(2):
            writer.write(asked)
            status, headers, _ = await read_response(reader)
            assert (status, headers["connection"]) == (200, "keep-alive")


async def test_a_chunked_request_of_http_1_0_is_the_last_one_on_its_connection(gateway: GatewayApp) -> None:
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(json.dumps(HI)), json.dumps(HI).encode())
    chunked = raw_task(b"", "Connection: keep-alive", framing=CHUNKED, version="1.0", close=False)
    received = await gateway.exchange(chunked + body + HEALTH)
    assert re.findall(rb"HTTP/1.0 (\d+)", received) == [b"200"]


@pytest.mark.parametrize(("version", "expectation"), [("1.0", "100-continue"), ("1.1", "200-ok")])
async def test_a_client_of_http_1_0_or_with_another_expectation_gets_no_interim_response(
    gateway: GatewayApp, version: str, expectation: str
) -> None:
    body = json.dumps(HI).encode()
    asked = raw_task(body, f"Expect: {expectation}", version=version)
    async with gateway.connect(asked[: -len(body)]) as (reader, writer):
        assert await gateway.is_healthy()
        writer.write(body)
        assert await read_status(reader) == 200


async def test_a_path_that_does_not_exist_is_refused_before_the_body_is_sent(gateway: GatewayApp) -> None:
    asked = raw_get("/nope", "Expect: 100-continue", "Content-Length: 1000000")
    assert await gateway.status_of(asked) == 404


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\nb", "a\0", "\x7f"])
def test_a_header_with_a_control_character_is_never_sent(value: str) -> None:
    with pytest.raises(ValueError, match="control character"):
        encode_head((1, 1), 200, {"Content-Type": value})


def test_a_header_may_contain_tabs_and_every_script() -> None:
    head = encode_head((1, 1), 200, {"A": "b\tc", "D": "é\u2028"})
    assert head == "HTTP/1.1 200 OK\r\nA: b\tc\r\nD: é\u2028\r\n\r\n".encode()


async def test_a_closing_gateway_answers_the_current_requests(gateway: GatewayApp) -> None:
    go_on = asyncio.Event()
    services = replace(gateway.services, tasks=_whole(go_on.wait))
    async with open_clients(services, closing_time=10) as clients:
        client, idle = await clients.connect(TASK + TASK), await clients.connect(HEALTH)
        client.read_everything()
        idle.read_everything()
        await until(lambda: idle.received)
        asyncio.get_running_loop().call_later(0.03, go_on.set)
    assert client.received.count(b"HTTP/1.1 200 ") == 1  # no further request is begun
    assert client.closed.is_set()
    assert idle.closed.is_set()


async def test_a_closing_gateway_cancels_what_takes_too_long(gateway: GatewayApp) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with asyncio.timeout(20):
        async with open_clients(replace(gateway.services, tasks=_whole(wait))) as clients:
            client = await clients.connect(TASK)
            await begun.wait()
        await ended.wait()
    assert client.unread.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"shutting_down"' in client.unread


async def test_a_closing_gateway_waits_for_the_cleanup_of_a_request_whose_client_has_left(
    gateway: GatewayApp,
) -> None:
    begun, left, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
            await asyncio.sleep(0.05)  # such as the settlement of the task
            ended.set()

    async with open_clients(replace(gateway.services, tasks=_whole(wait)), closing_time=20) as clients:
        client = await clients.connect(TASK)
        await begun.wait()
        client.abort()
        await left.wait()
    assert ended.is_set()


async def test_a_closing_gateway_refuses_a_request_whose_body_has_not_arrived(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(TASK[:-1])
        client.read_everything()
    assert client.closed.is_set()  # after a while to read: the end of the process would reset it
    assert client.received.startswith(b"HTTP/1.1 503 ")
    assert client.received.count(b"HTTP/1.1 ") == 1
    assert b"\r\nRetry-After: 1\r\n" in client.received
    assert b'"code":"shutting_down"' in client.received


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("fields", [HI, STREAM], ids=["whole", "stream"])
async def test_each_response_of_a_draining_gateway_is_the_last_one_on_its_connection(
    open_gateway: OpenApp, fields: dict[str, Any], version: str
) -> None:
    readiness = Readiness()
    kept = raw_task(fields, "Connection: keep-alive", version=version, close=False)
    async with open_gateway(readiness=readiness) as gateway, gateway.connect(TASK) as (reader, writer):
        assert await read_status(reader) == 200
        readiness.drain()
        writer.write(kept + HEALTH)
        received = await reader.read()
    head = headers_of(received)
    assert received.count(b"HTTP/1.") == 1
    assert head.get("connection") == ("close" if version == "1.1" else None)


@pytest.mark.parametrize(("version", "is_reset"), [("1.1", False), ("1.0", True)])
@pytest.mark.parametrize("is_complete", [False, True], ids=["cut", "unread"])
async def test_a_closing_gateway_lets_clients_read_what_was_sent_unless_it_would_look_complete(
    gateway: GatewayApp, version: str, is_complete: bool, is_reset: bool
) -> None:
    """What has not left the process when it ends is lost: of a stream of HTTP/1.0, without a trace."""
    first, last = text_events("one")
    gateway.provider.script = play(first, last if is_complete else asyncio.Event().wait)
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(raw_task(STREAM, version=version, close=False))
        await until(lambda: (b"[DONE]" if is_complete else b"one") in client.unread)
    async with asyncio.timeout(20):
        await gateway.provider.closed.wait()
    assert (client.is_aborted, client.closed.is_set()) == (is_reset, is_reset)


def _whole(wait: Any) -> Any:
    """Tasks whose result comes after `wait`."""

    class Tasks(ScriptedTasks):
        async def run_task(self, *args: Any) -> TaskResult:
            await wait()
            return text_events("one")[-1].completed

    return Tasks()
