"""CORS: preflight requests, and the headers by which scripts of allowed origins may read answers."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager

import pytest

from gateway.openapi.schema import RESPONSE_HEADERS
from pomelo.call import Call, Principal
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.providers.base import Job
from tests.gateway.door import KEY, SOUND, Door, authenticate, open_door, words

OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]
APP, LOCAL, FOREIGN = "https://app.example", "http://localhost:3000", "https://evil.example"
HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}
PATHS = [
    *("/api/v1/task", "/api/v1/models", "/api/v1/models/gpt-4", "/api/v1/account", "/api/v1/usage"),
    *("/media/media_x.png?e=1&s=2", "/openapi.json", "/healthz", "/nowhere"),
]
PREFLIGHT = (
    b"OPTIONS /api/v1/task HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example\r\n"
    b"Access-Control-Request-Method: POST\r\n\r\n"
)
ASKED = {
    "authorization", "content-type", "idempotency-key", "x-request-id", "x-request-timeout", "prefer",
    "traceparent", "accept",
}  # fmt: skip
EXPOSED = {
    "retry-after", "x-request-id", "x-pomelo-mode", "x-pomelo-adjusted", "x-credits-remaining",
    "x-credits-charged", "idempotent-replayed", "preference-applied", "deprecation", "sunset",
} | {name.lower() for name in RESPONSE_HEADERS}  # fmt: skip


@pytest.fixture(scope="module", name="shared")
async def _shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    async with open_door(
        tmp_path_factory.mktemp("media"), cors_origins=(APP, LOCAL), json_limit=4096
    ) as door:
        yield door


def names(listed: str) -> set[str]:
    """The names in a list of headers, in lower case."""
    return {name.strip().lower() for name in listed.split(",")}


def is_shared(headers: Mapping[str, str], origin: str = APP) -> bool:
    """Whether a script of the origin may read the answer and the headers of ours."""
    assert names(headers["Access-Control-Expose-Headers"]) >= EXPOSED
    assert "Access-Control-Allow-Credentials" not in headers
    assert headers.get("Vary") == ("Origin" if origin != "*" else None)
    return headers["Access-Control-Allow-Origin"] == origin


def is_private(headers: Mapping[str, str]) -> bool:
    """Whether an answer allows no script to read it."""
    return not [name for name in headers if name.lower().startswith("access-control-")]


def preflight(door: Door, path: str, origin: str, headers: str = ", ".join(sorted(ASKED))):
    """What a browser sends ahead of a request; no key."""
    given = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": headers,
    }
    return door.http.options(door.url + path, headers=given)


# --- preflight requests


@pytest.mark.parametrize("origin", [APP, LOCAL])
@pytest.mark.parametrize("path", PATHS)
async def test_a_preflight_of_an_allowed_origin_needs_no_key(shared: Door, path: str, origin: str) -> None:
    async with preflight(shared, path, origin) as answer:
        assert (answer.status, await answer.read()) == (204, b"")
        headers = answer.headers
        assert headers["Access-Control-Allow-Origin"] == origin
        assert headers["Vary"] == "Origin"
        assert names(headers["Access-Control-Allow-Methods"]) == {"get", "head", "post"}
        assert names(headers["Access-Control-Allow-Headers"]) >= ASKED
        assert int(headers["Access-Control-Max-Age"]) >= 600
        assert "Access-Control-Allow-Credentials" not in headers


@pytest.mark.parametrize(
    "origin", [FOREIGN, "null", APP + ":444", "http://app.example", APP + ".evil.example", APP + "/", "*", ""]
)
async def test_a_preflight_of_another_origin_allows_nothing(shared: Door, origin: str) -> None:
    async with preflight(shared, "/api/v1/task", origin) as answer:
        assert answer.status == 204
        assert is_private(answer.headers)
        assert answer.headers["Vary"] == "Origin"


async def test_options_that_is_no_preflight_is_another_method(shared: Door) -> None:
    async with shared.http.options(f"{shared.url}/api/v1/task", headers={"Origin": APP}) as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
        assert is_shared(answer.headers)


async def test_without_origins_nothing_has_cors_headers(door: Door) -> None:
    async with preflight(door, "/api/v1/task", APP) as answer:
        assert answer.status == 405
        assert is_private(answer.headers)
        assert "Vary" not in answer.headers
    async with door.ask(HI, headers={"Origin": APP}) as answer:
        assert answer.status == 200
        assert is_private(answer.headers)
        assert "Vary" not in answer.headers


async def test_a_star_allows_every_origin(opened: OpenDoor) -> None:
    async with opened(cors_origins=("*",)) as door:
        for origin in (APP, FOREIGN, "null"):
            async with preflight(door, "/api/v1/task", origin) as answer:
                assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, "*")
            async with door.ask(HI, headers={"Origin": origin}) as answer:
                assert is_shared(answer.headers, "*")
        async with door.ask(HI) as answer:  # a cache may return it to a script
            assert is_shared(answer.headers, "*")


async def test_preflights_are_bounded_like_other_requests_without_a_key(opened: OpenDoor) -> None:
    async with opened(cors_origins=(APP,), untrusted_timeout=0.5) as door:
        got = await door.raw(PREFLIGHT * 50)
        assert got.count(b"HTTP/1.1 204 ") == got.count(b"HTTP/1.1 ") == 4
        begin = asyncio.get_running_loop().time()
        assert (await door.raw(PREFLIGHT)).startswith(b"HTTP/1.1 204 ")
        assert asyncio.get_running_loop().time() - begin < 4  # the connection is closed soon


async def test_a_preflight_leaves_a_trusted_connection_trusted(opened: OpenDoor) -> None:
    account = f"GET /api/v1/account HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    async with opened(cors_origins=(APP,), untrusted_timeout=0.3) as door, door.talk(b"") as (reader, writer):
        for request, status in ((account, 200), (PREFLIGHT, 204), (account, 200)):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status)
            await reader.readexactly(int(head_of(head).get("Content-Length", 0)))
            await asyncio.sleep(0.9)  # longer than a connection without a key stays


# --- answers


ANSWERS = {
    "a completion": (200, "POST", "/api/v1/task", {"json": HI}),
    "a stream": (200, "POST", "/api/v1/task", {"json": HI | {"stream": True}}),
    "raw audio": (200, "POST", "/api/v1/task", {"json": TTS, "headers": {"Accept": "audio/*"}}),
    "models": (200, "GET", "/api/v1/models", {}),
    "an account": (200, "GET", "/api/v1/account", {}),
    "a description": (200, "GET", "/openapi.json", {}),
    "health": (200, "GET", "/healthz", {}),
    "no key": (401, "POST", "/api/v1/task", {"json": HI, "headers": {"Authorization": ""}}),
    "a wrong field": (400, "POST", "/api/v1/task", {"json": HI | {"temperature": 9}}),
    "a wrong stream": (400, "POST", "/api/v1/task", {"json": {"model": "gpt-4", "stream": True}}),
    "a header twice": (400, "GET", "/api/v1/account", {"headers": [("Prefer", "a"), ("Prefer", "b")]}),
    "no JSON": (400, "POST", "/api/v1/task", {"data": b"{", "headers": {"Content-Type": "application/json"}}),
    "too large": (413, "POST", "/api/v1/task", {"json": HI | {"user": "x" * 5000}}),
    "another type": (415, "POST", "/api/v1/task", {"data": b"x", "headers": {"Content-Type": "text/plain"}}),
    "no route": (404, "GET", "/nowhere", {}),
    "another method": (405, "DELETE", "/api/v1/task", {}),
    "no media": (404, "GET", "/media/media_x.png", {}),
    "a wrong link": (404, "GET", "/media/media_x.png?e=1&s=2", {}),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_every_answer_may_be_read_by_an_allowed_origin_alone(shared: Door, name: str) -> None:
    status, method, path, given = ANSWERS[name]
    for origin in (APP, FOREIGN, None):
        headers = [("Origin", origin)] if origin is not None else []
        more = given.get("headers", {})
        more = list(more.items() if isinstance(more, dict) else more)
        if not any(name == "Authorization" for name, _ in more):
            headers += list(shared.headers.items())
        sent = given | {"headers": headers + more}
        async with shared.http.request(method, shared.url + path, **sent) as answer:
            assert answer.status == status
            await answer.read()
            if origin == APP:
                assert is_shared(answer.headers)
            else:
                assert is_private(answer.headers)
                assert answer.headers["Vary"] == "Origin"


async def test_media_of_a_link_may_be_read_whole_in_part_and_by_head(shared: Door) -> None:
    async with shared.ask({**TTS, "response_format": "url"}) as answer:
        url = (await answer.json())["audio"]["url"]
    for method, part, status, body in (
        ("GET", None, 200, SOUND),
        ("GET", "bytes=10-19", 206, SOUND[10:20]),
        ("HEAD", None, 200, b""),
    ):
        headers = {"Origin": APP} | ({"Range": part} if part else {})
        async with shared.http.request(method, url, headers=headers) as answer:
            assert (answer.status, await answer.read()) == (status, body)
            assert is_shared(answer.headers)
            assert {"content-range", "accept-ranges"} <= names(
                answer.headers["Access-Control-Expose-Headers"]
            )
        async with shared.http.request(method, url, headers=headers | {"Origin": FOREIGN}) as answer:
            assert answer.status == status
            assert is_private(answer.headers)


# --- refusals that no route sends


def head_of(raw: bytes) -> dict[str, str]:
    """The headers of an answer that was read as bytes."""
    first, *lines = raw.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert first.startswith("HTTP/1.1 ")
    return dict(line.split(": ", 1) for line in lines)


def task(origin: str) -> bytes:
    """A task, as bytes."""
    body = json.dumps(HI).encode()
    head = f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\norigin:{origin}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_a_refusal_on_a_surplus_connection_may_be_read(opened: OpenDoor) -> None:
    begun = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        begun.set()
        await asyncio.Event().wait()
        yield words("late")[0]

    async with opened(max_connections=1, cors_origins=(APP,)) as door:
        door.player.script = script
        async with door.talk(task(APP)):  # the only connection is busy
            await asyncio.wait_for(begun.wait(), 5)
            for origin, readable in ((APP, is_shared), (FOREIGN, is_private)):
                refused = await door.raw(task(origin))
                assert refused.startswith(b"HTTP/1.1 503 ")
                assert readable(head_of(refused))


async def test_a_refusal_while_the_key_is_looked_up_may_be_read(opened: OpenDoor) -> None:
    begun = asyncio.Event()

    async def slow(call: Call) -> Principal:
        if not begun.is_set():
            begun.set()
            await asyncio.Event().wait()
        return await authenticate(call)

    for origin, readable in ((APP, is_shared), (FOREIGN, is_private)):
        begun.clear()
        async with opened(max_connections=1, cors_origins=(APP,), authenticate=slow) as door:
            async with door.talk(task(origin)) as (reader, _):
                await asyncio.wait_for(begun.wait(), 5)
                async with door.talk(task(APP)):  # takes the place of the first, which is not trusted yet
                    refused = await reader.read()
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert readable(head_of(refused))


async def test_a_refusal_of_a_request_that_was_not_parsed_may_be_read(opened: OpenDoor) -> None:
    async with opened(max_connections=4, cors_origins=(APP,)) as door:
        origins = [APP, FOREIGN] * 10
        # All have sent their requests before the server accepts the first: the last ones take the places.
        sockets = [socket.create_connection((door.host, door.port)) for _ in origins]
        for each, origin in zip(sockets, origins, strict=True):
            each.sendall(task(origin))
        for each, origin in zip(sockets[:16], origins, strict=False):
            reader, writer = await asyncio.open_connection(sock=each)
            refused = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert (is_shared if origin == APP else is_private)(head_of(refused))
        for each in sockets[16:]:
            each.close()
