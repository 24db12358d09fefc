"""The page at `/`: its files, and the headers that browsers get with them."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from gateway import page
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import code_of

FILES = Path(page.__file__).parent / "static"
OWN = [path for path in FILES.iterdir() if path.is_file()]


async def test_the_page_is_served_without_a_key(gateway: GatewayApp) -> None:
    for path in ("/", "/?utm_source=mail"):
        async with gateway.http.get(gateway.url + path) as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/html; charset=utf-8"
            assert "<title>Pomelo</title>" in await response.text()


@pytest.mark.parametrize(
    "path", ["/", "/page/main.js", "/page/style.css", "/page/icon.svg", "/page/uPlot.esm.js"]
)
async def test_browsers_may_load_nothing_of_other_hosts_and_nothing_inline(
    gateway: GatewayApp, path: str
) -> None:
    async with gateway.http.get(gateway.url + path) as response:
        assert response.status == 200
        policy = dict(each.split(" ", 1) for each in response.headers["Content-Security-Policy"].split("; "))
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "microphone=(self)" in response.headers["Permissions-Policy"]
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert not re.search(r"unsafe|http|\*", response.headers["Content-Security-Policy"])


async def test_a_browser_that_has_a_file_is_not_sent_it_again(gateway: GatewayApp) -> None:
    url = f"{gateway.url}/page/main.js"
    async with gateway.http.get(url) as first:
        tag = first.headers["ETag"]
        assert first.headers["Cache-Control"] == "private, no-cache"
    async with gateway.http.get(url, headers={"If-None-Match": tag}) as second:
        assert (second.status, await second.read(), second.headers["ETag"]) == (304, b"", tag)
    async with gateway.http.get(url, headers={"If-None-Match": 'W/"other"'}) as third:
        assert third.status == 200


async def test_files_are_compressed_for_clients_that_accept_it(gateway: GatewayApp) -> None:
    url = f"{gateway.url}/page/style.css"
    plain = (FILES / "style.css").read_bytes()
    async with gateway.http.get(url, headers={"Accept-Encoding": "identity"}) as response:
        assert "Content-Encoding" not in response.headers
        assert await response.read() == plain
    async with gateway.http.get(
        url, headers={"Accept-Encoding": "br, gzip"}, auto_decompress=False
    ) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(await response.read()) == plain


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page",
        "/page/nothing.js",
        "/page/..%2F__init__.py",
        "/page/vendor/uPlot.esm.js",
        "/page/LICENSE",
    ],
)
async def test_other_paths_are_not_found(gateway: GatewayApp, path: str) -> None:
    assert await code_of(gateway.http.get(gateway.url + path)) == (404, "not_found")


async def test_the_page_can_be_turned_off(open_gateway: OpenApp) -> None:
    async with open_gateway(page=False) as gateway:
        for path in ("/", "/page/main.js"):
            assert await code_of(gateway.http.get(gateway.url + path)) == (404, "not_found")
        async with gateway.http.get(f"{gateway.url}/openapi.json") as response:
            assert response.status == 200


def test_the_files_name_only_each_other() -> None:
    names = {path.name for path in FILES.rglob("*")}
    for path in OWN:
        text = path.read_text()
        named = re.findall(r"""(?:from|import\() ?'\./([^']+)'|(?:src|href)="page/([^"]+)\"""", text)
        assert {one or other for one, other in named} <= names, path.name
        assert set(re.findall(r"https?://[^\"'\s`$]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name
