"""The page at `/`: its files, and the headers that browsers get with them."""

from __future__ import annotations

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
    async with gateway.http.get(f"{gateway.url}/page/style.css") as response:
        assert await response.read() == (FILES / "style.css").read_bytes()


@pytest.mark.parametrize(
    "path", ["/", "/page/main.js", "/page/style.css", "/page/icon.svg", "/page/uPlot.esm.js", "/docs"]
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
