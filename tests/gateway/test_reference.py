"""The files of the API reference at /docs, and what all static files have in common."""

from __future__ import annotations

import gzip
import re

import pytest

from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import code_of

FILES = (
    "/docs",
    "/docs/reference.js",
    "/docs/reference.css",
    "/docs/swagger-ui.css",
    "/docs/swagger-ui-bundle.js",
)
LICENCE = "/docs/swagger-ui-bundle.js.LICENSE.txt"


@pytest.mark.parametrize("path", [*FILES, LICENCE, "/", "/page/main.js", "/page/style.css"])
async def test_every_file_needs_no_key_and_is_compressed_if_the_client_takes_that(
    gateway: GatewayApp, path: str
) -> None:
    plain = {"Accept-Encoding": "identity"}
    async with gateway.http.get(gateway.url + path, headers=plain) as response:
        assert (response.status, response.headers.get("Content-Encoding")) == (200, None)
        assert response.headers["Cache-Control"] == "private, no-cache"
        body, tag = await response.read(), response.headers["ETag"]
    compressed = {"Accept-Encoding": "br, gzip, deflate"}
    async with gateway.http.get(gateway.url + path, headers=compressed, auto_decompress=False) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Vary"] == "Accept-Encoding"
        assert response.headers["ETag"] == tag
        assert gzip.decompress(await response.read()) == body
    for accepted, encoding in (
        ("gzip;q=0", None),
        ("br, GZIP ; q=0.000, *", None),
        ("deflate, gzip;q=0.1", "gzip"),
        ("x-gzip", "gzip"),
        ("notgzip", None),
    ):
        async with gateway.http.get(gateway.url + path, headers={"Accept-Encoding": accepted}) as response:
            assert response.headers.get("Content-Encoding") == encoding
            assert (response.headers["Vary"], await response.read()) == ("Accept-Encoding", body)
    async with gateway.http.get(gateway.url + path, headers={"If-None-Match": tag}) as response:
        assert (response.status, await response.read()) == (304, b"")
        assert response.headers["ETag"] == tag
    async with gateway.http.get(gateway.url + path, headers={"If-None-Match": 'W/"other"'}) as response:
        assert response.status == 200


async def test_the_page_loads_nothing_from_another_host(gateway: GatewayApp) -> None:
    async with gateway.http.get(gateway.url + "/docs") as response:
        page = await response.text()
        assert response.content_type == "text/html"
    linked = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert set(FILES[1:]) <= {f"/{each}" for each in linked}
    assert not [each for each in linked if ":" in each and not each.startswith("data:")]


@pytest.mark.parametrize(
    "path",
    [
        *("/docs/", "/docs/nothing.js", "/docs/__init__.py", "/docs/..%2f__init__.py", "/docs/LICENSE/x"),
        *("/page/", "/page", "/page/nothing.js", "/page/..%2F__init__.py"),
        *("/page/vendor/uPlot.esm.js", "/page/LICENSE"),
    ],
)
async def test_an_unknown_file_is_not_found(gateway: GatewayApp, path: str) -> None:
    assert await code_of(gateway.http.get(gateway.url + path)) == (404, "not_found")
