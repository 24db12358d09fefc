"""The heads of requests, byte by byte, and what may never get into them."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Mapping

import aiohttp
import pytest
from yarl import URL

import pomelo
from pomelo.errors import PomeloError
from pomelo.providers.http.client import Http
from pomelo.testing.leaks import printed_error
from tests.unit.providers.raw_server import CHAT, OK, PAID, Peer, RawServer, raw_server

CANARY = "sk-canary-3141"
AGENT = f"User-Agent: pomelo/{pomelo.__version__}"
TEXT = {"Authorization": "Bearer sk-1", "content-type": "application/json"}


@pytest.fixture(name="http")
async def _http() -> AsyncIterator[Http]:
    async with Http() as opened:
        yield opened


@pytest.fixture(name="server")
async def _server() -> AsyncIterator[RawServer]:
    async def answer(peer: Peer) -> None:
        while True:
            await peer.request()
            peer.writer.write(OK)

    async with raw_server(answer) as opened:
        yield opened


def lines(server: RawServer) -> list[str]:
    """The request line of the last request, and its fields."""
    request_line, *fields = server.peers[-1].head.decode().removesuffix("\r\n\r\n").split("\r\n")
    return [request_line, *sorted(fields)]


@pytest.mark.parametrize("again", [False, True])
async def test_a_json_request_has_these_lines(http: Http, server: RawServer, again: bool) -> None:
    for _ in range(1 + again):
        await http.request_json(server.url / "v1/chat" % {"a": "b c"}, TEXT, b"[1]", CHAT)
    assert lines(server) == [
        "POST /v1/chat?a=b+c HTTP/1.1",
        "Accept-Encoding: identity",
        "Accept: */*",
        "Authorization: Bearer sk-1",
        "Content-Length: 3",
        f"Host: 127.0.0.1:{server.url.port}",
        AGENT,
        "content-type: application/json",
    ]
    assert server.peers[-1].body == b"[1]"


async def test_a_question_has_no_body_and_no_content_type(http: Http, server: RawServer) -> None:
    await http.request_json(server.url, {"X-Key": "é", "Accept": "text/x"}, None, CHAT)
    assert lines(server) == [
        "GET / HTTP/1.1",
        "Accept-Encoding: identity",
        "Accept: text/x",
        f"Host: 127.0.0.1:{server.url.port}",
        AGENT,
        "X-Key: é",
    ]


async def test_a_request_on_a_connection_of_its_own_asks_the_server_to_close_it(
    http: Http, server: RawServer
) -> None:
    await http.request_json(server.url, {}, b"", PAID)
    assert lines(server) == [
        "POST / HTTP/1.1",
        "Accept-Encoding: identity",
        "Accept: */*",
        "Connection: close",
        "Content-Length: 0",
        "Content-Type: application/octet-stream",
        f"Host: 127.0.0.1:{server.url.port}",
        AGENT,
    ]


async def test_the_parts_of_a_form_and_its_size_are_these_bytes(http: Http, server: RawServer) -> None:
    form = aiohttp.MultipartWriter("form-data", boundary="limit")
    form.append("tëxt").set_content_disposition("form-data", name='a"b')
    form.append(b"bytes" * 100_000).set_content_disposition("form-data", name="file", filename='x"y.mp3')
    await http.request_json(server.url, {"xi-api-key": "k"}, form, CHAT)
    expected = (
        b"--limit\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b'Content-Disposition: form-data; name="a\\"b"\r\n\r\nt\xc3\xabxt\r\n'
        b"--limit\r\nContent-Type: application/octet-stream\r\n"
        b'Content-Disposition: form-data; name="file"; filename="x%22y.mp3"\r\n\r\n'
        + b"bytes" * 100_000
        + b"\r\n--limit--\r\n"
    )
    assert server.peers[-1].body == expected
    assert "Content-Type: multipart/form-data; boundary=limit" in lines(server)
    assert f"Content-Length: {len(expected)}" in lines(server)


async def test_a_form_whose_part_can_not_be_read_is_not_sent_to_its_end(
    http: Http, server: RawServer
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ValueError(CANARY)

    form = aiohttp.MultipartWriter("form-data")
    form.append(Broken(b"x" * 10)).set_content_disposition("form-data", name="file")
    with pytest.raises(PomeloError) as failure:
        await http.request_json(server.url, {}, form, CHAT)
    assert failure.value.code == "provider_unavailable"
    assert CANARY not in printed_error(failure.value)
    assert await server.peers[0].left()


@pytest.mark.parametrize(
    "headers",
    [
        {"X": f"{CANARY}\r\nX-Evil: 1"},
        {"X": f"{CANARY}\n"},
        {"X": f"{CANARY}\r"},
        {"X": f"{CANARY}\0"},
        {"X": f"{CANARY}\x7f"},
        {"X": f"{CANARY}\ud800"},
        {f"{CANARY}\r\nX-Evil": "1"},
        {f"{CANARY}: 1": "1"},
        {f"{CANARY} ": "1"},
        {CANARY + "é": "1"},
        {"": CANARY},
        {"Content-Length": CANARY},
        {"transfer-encoding": "chunked", "X": CANARY},
    ],
)
async def test_a_header_never_contains_another_line_and_an_error_never_contains_a_header(
    http: Http, server: RawServer, headers: Mapping[str, str]
) -> None:
    with pytest.raises(PomeloError) as failure:
        await http.request_json(server.url, headers, b"{}", CHAT)
    assert failure.value.code == "provider_failed"
    assert CANARY not in printed_error(failure.value)
    assert server.peers == []


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX-Evil: 1", "/é", "/\0", "/a?b c"])
async def test_a_path_never_contains_another_line(http: Http, server: RawServer, path: str) -> None:
    url = URL(f"{server.url.origin()}{path}", encoded=True)
    with pytest.raises(PomeloError) as failure:
        await http.request_json(url, {}, b"{}", CHAT)
    assert failure.value.code == "provider_failed"
    assert server.peers == []


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "/path", "", "unix:/x", "//acme.example/"])
async def test_only_http_and_https_are_spoken(http: Http, url: str) -> None:
    with pytest.raises(PomeloError) as failure:
        await http.request_json(URL(url), {}, b"{}", CHAT)
    assert failure.value.code == "provider_failed"


async def test_credentials_in_a_url_are_sent_unless_there_are_others(http: Http, server: RawServer) -> None:
    url = server.url.with_user("jack").with_password("w:rd")
    await http.request_json(url, {}, b"{}", CHAT)
    assert "Authorization: Basic amFjazp3OnJk" in lines(server)
    with pytest.raises(PomeloError) as failure:
        await http.request_json(url, TEXT, b"{}", CHAT)
    assert failure.value.code == "provider_failed"


async def test_a_password_in_a_url_is_sent_without_a_user(http: Http, server: RawServer) -> None:
    await http.request_json(server.url.with_password("w:rd"), {}, b"{}", CHAT)
    assert "Authorization: Basic Onc6cmQ=" in lines(server)


async def test_a_form_of_unknown_size_is_not_sent(http: Http, server: RawServer) -> None:
    async def part() -> AsyncIterator[bytes]:
        yield b"x"

    form = aiohttp.MultipartWriter("form-data")
    form.append(part()).set_content_disposition("form-data", name="file")
    with pytest.raises(PomeloError) as failure:
        await http.request_json(server.url, {}, form, CHAT)
    assert failure.value.code == "provider_failed"
    assert server.peers == []


async def test_a_redirect_is_not_followed_and_a_cookie_not_kept(http: Http) -> None:
    responses = [
        b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\n{}",
        OK,
    ]

    async def answer(peer: Peer) -> None:
        while responses:
            await peer.request()
            peer.writer.write(responses.pop(0))

    async with raw_server(answer) as server:
        with pytest.raises(PomeloError) as failure:
            await http.request_json(server.url, {}, b"{}", CHAT)
        assert failure.value.code == "provider_failed"
        for _ in range(2):
            await http.request_json(server.url, {}, b"{}", CHAT)
        assert responses == []
        assert not any(line.lower().startswith("cookie") for line in lines(server))


async def test_proxies_of_the_environment_are_ignored(
    http: Http, server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await http.request_json(server.url, {}, b"{}", CHAT) == {}


async def test_many_urls_share_a_client_and_each_request_has_its_own_head(
    http: Http, server: RawServer
) -> None:
    for number in [*range(300), *range(3)]:
        await http.request_json(server.url / str(number), {"X": str(number)}, b"{}", CHAT)
        assert lines(server)[0] == f"POST /{number} HTTP/1.1"
        assert f"X: {number}" in lines(server)
