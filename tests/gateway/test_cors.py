"""CORS: preflight requests, and the headers by which scripts of allowed origins may read responses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from multidict import CIMultiDict

from gateway.openapi.schema import RESPONSE_HEADERS
from pomelo.call import Call, Principal
from tests.gateway.gateway_app import AUDIO, GatewayApp, OpenApp, authenticate, run_gateway
from tests.gateway.requests import (
    ACCOUNT,
    HI,
    JSON,
    TTS,
    Sending,
    headers_of,
    raw_get,
    raw_task,
    read_status,
)
from tests.gateway.scripts import play

APP, LOCAL, FOREIGN = "https://app.example", "http://localhost:3000", "https://evil.example"
PATHS = [
    *("/api/v1/task", "/api/v1/models", "/api/v1/models/gpt-4", "/api/v1/account", "/api/v1/usage"),
    *("/media/media_x.png?e=1&s=2", "/openapi.json", "/healthz", "/nowhere", "/v1/chat/completions"),
]
PREFLIGHT = (
    b"OPTIONS /api/v1/task HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example\r\n"
    b"Access-Control-Request-Method: POST\r\n\r\n"
)
ASKED = {
    "authorization", "content-type", "idempotency-key", "x-request-id", "x-request-timeout", "prefer",
    "traceparent", "tracestate", "baggage", "accept", "range", "if-none-match", "if-range", "last-event-id",
    "openai-organization", "openai-project", "user-agent",
    "x-stainless-arch", "x-stainless-helper-method", "x-stainless-lang", "x-stainless-os",
    "x-stainless-package-version", "x-stainless-retry-count", "x-stainless-runtime",
    "x-stainless-runtime-version", "x-stainless-timeout",
}  # fmt: skip
EXPOSED = {
    "retry-after", "x-request-id", "x-pomelo-mode", "x-pomelo-adjusted", "x-credits-remaining",
    "x-credits-charged", "idempotent-replayed", "preference-applied", "deprecation", "sunset",
    "x-should-retry", "allow",
} | {name.lower() for name in RESPONSE_HEADERS}  # fmt: skip


@pytest.fixture(scope="module", name="shared")
async def _shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GatewayApp]:
    async with run_gateway(
        tmp_path_factory.mktemp("media"), cors_origins=(APP, LOCAL), json_limit=4096
    ) as gateway:
        yield gateway


def header_names(listed: str) -> set[str]:
    """The names in a list of headers, in lower case."""
    return {name.strip().lower() for name in listed.split(",")}


def is_shared(headers: Mapping[str, str], origin: str = APP) -> bool:
    """Whether a script of the origin may read the response and its API headers."""
    assert header_names(headers["Access-Control-Expose-Headers"]) >= EXPOSED
    assert "Access-Control-Allow-Credentials" not in headers
    assert headers.get("Vary") == ("Origin" if origin != "*" else None)
    return headers["Access-Control-Allow-Origin"] == origin


def is_private(headers: Mapping[str, str]) -> bool:
    """Whether a response allows no script to read it."""
    return not [name for name in headers if name.lower().startswith("access-control-")]


def preflight(gateway: GatewayApp, path: str, origin: str) -> Sending:
    """Sends a preflight request, without a key."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": ", ".join(sorted(ASKED)),
    }
    return gateway.http.options(gateway.url + path, headers=headers)


# --- preflight requests


@pytest.mark.parametrize("origin", [APP, LOCAL])
@pytest.mark.parametrize("path", PATHS)
async def test_a_preflight_of_an_allowed_origin_needs_no_key(
    shared: GatewayApp, path: str, origin: str
) -> None:
    async with preflight(shared, path, origin) as response:
        assert (response.status, await response.read()) == (204, b"")
        headers = response.headers
        assert headers["Access-Control-Allow-Origin"] == origin
        assert headers["Vary"] == "Origin"
        assert (headers["Server"], headers["X-Content-Type-Options"]) == ("pomelo", "nosniff")
        assert headers["X-Request-Id"].startswith("req_")
        assert header_names(headers["Access-Control-Allow-Methods"]) == {"get", "head", "post"}
        assert header_names(headers["Access-Control-Allow-Headers"]) >= ASKED
        assert int(headers["Access-Control-Max-Age"]) >= 600
        assert "Access-Control-Allow-Credentials" not in headers


@pytest.mark.parametrize(
    "origin", [FOREIGN, "null", APP + ":444", "http://app.example", APP + ".evil.example", APP + "/", "*", ""]
)
async def test_a_preflight_of_another_origin_allows_nothing(shared: GatewayApp, origin: str) -> None:
    async with preflight(shared, "/api/v1/task", origin) as response:
        assert response.status == 204
        assert is_private(response.headers)
        assert response.headers["Vary"] == "Origin"


@pytest.mark.parametrize("origin", [APP, FOREIGN])
async def test_a_page_varies_by_its_encoding_too(shared: GatewayApp, origin: str) -> None:
    async with shared.http.get(f"{shared.url}/docs", headers={"Origin": origin}) as response:
        assert response.headers.getall("Vary") == ["Accept-Encoding, Origin"]


async def test_options_without_a_preflight_header_is_a_405(shared: GatewayApp) -> None:
    async with shared.http.options(f"{shared.url}/api/v1/task", headers={"Origin": APP}) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert is_shared(response.headers)


async def test_without_origins_nothing_has_cors_headers(gateway: GatewayApp) -> None:
    async with preflight(gateway, "/api/v1/task", APP) as response:
        assert response.status == 405
        assert is_private(response.headers)
        assert "Vary" not in response.headers
    async with gateway.post_task(HI, headers={"Origin": APP}) as response:
        assert response.status == 200
        assert is_private(response.headers)
        assert "Vary" not in response.headers


async def test_a_star_allows_every_origin(open_gateway: OpenApp) -> None:
    async with open_gateway(cors_origins=("*",)) as gateway:
        for origin in (APP, FOREIGN, "null"):
            async with preflight(gateway, "/api/v1/task", origin) as response:
                assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "*")
            async with gateway.post_task(HI, headers={"Origin": origin}) as response:
                assert is_shared(response.headers, "*")
        async with gateway.post_task(HI) as response:  # a cache may return it to a script
            assert is_shared(response.headers, "*")


async def test_preflights_are_limited_like_other_unauthenticated_requests(open_gateway: OpenApp) -> None:
    async with open_gateway(cors_origins=(APP,), untrusted_timeout=0.5) as gateway:
        got = await gateway.exchange(PREFLIGHT * 50)
        assert got.count(b"HTTP/1.1 204 ") == got.count(b"HTTP/1.1 ") == 4
        begin = asyncio.get_running_loop().time()
        assert (await gateway.exchange(PREFLIGHT)).startswith(b"HTTP/1.1 204 ")
        assert asyncio.get_running_loop().time() - begin < 9  # the connection is closed soon


async def test_a_preflight_leaves_a_trusted_connection_trusted(open_gateway: OpenApp) -> None:
    async with (
        open_gateway(cors_origins=(APP,), untrusted_timeout=0.6) as gateway,
        gateway.connect() as (reader, writer),
    ):
        for request, status in ((ACCOUNT, 200), (PREFLIGHT, 204), (ACCOUNT, 200)):
            writer.write(request)
            assert await read_status(reader) == status
            await asyncio.sleep(0.9)  # longer than the lifetime of an untrusted connection


# --- responses


REQUESTS: dict[str, tuple[int, str, str, dict[str, Any]]] = {
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
    "no JSON": (400, "POST", "/api/v1/task", {"data": b"{", "headers": {"Content-Type": JSON}}),
    "too large": (413, "POST", "/api/v1/task", {"json": HI | {"user": "x" * 5000}}),
    "another type": (415, "POST", "/api/v1/task", {"data": b"x", "headers": {"Content-Type": "text/plain"}}),
    "no route": (404, "GET", "/nowhere", {}),
    "another method": (405, "DELETE", "/api/v1/task", {}),
    "no media": (404, "GET", "/media/media_x.png", {}),
    "a wrong link": (404, "GET", "/media/media_x.png?e=1&s=2", {}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_every_response_is_readable_only_by_an_allowed_origin(shared: GatewayApp, name: str) -> None:
    status, method, path, given = REQUESTS[name]
    for origin in (APP, FOREIGN, None):
        headers = [("Origin", origin)] if origin is not None else []
        more = given.get("headers", {})
        more = list(more.items() if isinstance(more, dict) else more)
        if not any(name == "Authorization" for name, _ in more):
            headers += list(shared.headers.items())
        sent = given | {"headers": headers + more}
        async with shared.http.request(method, shared.url + path, **sent) as response:
            assert response.status == status
            await response.read()
            if origin == APP:
                assert is_shared(response.headers)
            else:
                assert is_private(response.headers)
                assert response.headers["Vary"] == "Origin"


async def test_linked_media_is_readable_across_origins_completely_by_range_and_by_head(
    shared: GatewayApp,
) -> None:
    async with shared.post_task({**TTS, "response_format": "url"}) as response:
        url = (await response.json())["audio"]["url"]
    for method, part, status, body in (
        ("GET", None, 200, AUDIO),
        ("GET", "bytes=10-19", 206, AUDIO[10:20]),
        ("HEAD", None, 200, b""),
    ):
        headers = {"Origin": APP} | ({"Range": part} if part else {})
        async with shared.http.request(method, url, headers=headers) as response:
            assert (response.status, await response.read()) == (status, body)
            assert is_shared(response.headers)
            assert {"content-range", "accept-ranges", "etag"} <= header_names(
                response.headers["Access-Control-Expose-Headers"]
            )
        async with shared.http.request(method, url, headers=headers | {"Origin": FOREIGN}) as response:
            assert response.status == status
            assert is_private(response.headers)


# --- errors that no route sends


def task(origin: str, header: str = "origin:") -> bytes:
    """A task request of a page, as bytes."""
    return raw_task(HI, header + origin, close=False)


def is_refused(received: bytes, origin: str) -> bool:
    """Whether bytes are a refusal that only a script of the allowed origin may read."""
    headers = CIMultiDict(headers_of(received))
    return received.startswith(b"HTTP/1.1 503 ") and (is_shared if origin == APP else is_private)(headers)


@pytest.mark.parametrize("origin", [APP, FOREIGN])
async def test_an_error_for_an_unreadable_head_is_readable_across_origins(
    shared: GatewayApp, origin: str
) -> None:
    sent = raw_get("/api/v1/account", f"Origin: {origin}", "X-Long: " + "x" * 9_000)
    received = await shared.exchange(sent)
    assert received.partition(b"\r\n")[0].endswith(b" 400 Bad Request")
    assert (is_shared if origin == APP else is_private)(CIMultiDict(headers_of(received)))


@pytest.mark.parametrize("origin", [APP, FOREIGN])
async def test_an_error_on_a_surplus_connection_is_readable_across_origins(
    open_gateway: OpenApp, origin: str
) -> None:
    started = asyncio.Event()
    async with open_gateway(max_connections=1, cors_origins=(APP,)) as gateway:
        gateway.provider.script = play(started.set, asyncio.Event().wait)
        async with gateway.connect(task(APP)):  # the only connection is busy
            await asyncio.wait_for(started.wait(), 20)
            assert is_refused(await gateway.exchange(task(origin)), origin)


@pytest.mark.parametrize("origin", [APP, FOREIGN])
async def test_an_error_during_the_key_check_is_readable_across_origins(
    open_gateway: OpenApp, origin: str
) -> None:
    started = asyncio.Event()

    async def slow(call: Call) -> Principal:
        if not started.is_set():
            started.set()
            await asyncio.Event().wait()
        return await authenticate(call)

    async with (
        open_gateway(max_connections=1, cors_origins=(APP,), authenticate=slow) as gateway,
        gateway.connect(task(origin)) as (reader, _),
    ):
        await asyncio.wait_for(started.wait(), 20)
        async with gateway.connect(task(APP)):  # evicts the first, which is not trusted yet
            assert is_refused(await reader.read(), origin)


@pytest.mark.parametrize("header", ["origin:", "Origin: "])
async def test_an_error_for_an_unparsed_request_is_readable_across_origins(
    open_gateway: OpenApp, header: str
) -> None:
    async with open_gateway(max_connections=4, cors_origins=(APP,)) as gateway:
        origins = [APP, FOREIGN] * 10
        # All requests are sent before the server accepts the first connection: the last ones get the slots.
        sockets = [socket.create_connection((gateway.host, gateway.port)) for _ in origins]
        for each, origin in zip(sockets, origins, strict=True):
            each.sendall(task(origin, header))
        for each, origin in zip(sockets[:16], origins, strict=False):
            reader, writer = await asyncio.open_connection(sock=each)
            refused = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            assert is_refused(refused, origin)
        for each in sockets[16:]:
            each.close()
