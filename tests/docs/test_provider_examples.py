"""The package of docs/provider-examples.md: written to files, installed, served and called."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.docs.packages import install_package, path_with, run_suite, write_package
from tests.driver import STREAM
from tests.integration.commands import live_key
from tests.serving import Served, serve
from tests.tasks import text_body
from tests.web_server import serve_application

PNG = b"\x89PNG\r\n\x1a\n" + bytes(64) + b"\0\0\0\0IEND\xaeB`\x82"
KEY = "key-of-the-operator"


@dataclass
class Vendors:
    """The APIs of Ink, of Loom and of Quill."""

    url: str = ""
    requests: list[Any] = field(default_factory=list)
    polls: int = 0

    async def draw(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Key {KEY}"
        self.requests.append(await request.json())
        return web.Response(body=PNG, content_type="image/png")

    async def order(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        self.requests.append(await request.json())
        self.polls = 0
        return web.json_response({"id": "7", "status": "weaving"})

    async def state(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        self.polls += 1
        if self.polls == 1:
            return web.json_response({"status": "weaving", "progress": 0.5})
        return web.json_response({"status": "woven", "file": f"{self.url}/file.png"})

    async def write(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Quill {KEY}"
        body = await request.json()
        self.requests.append(body)
        end = {"end": "full stop", "drops": [3, 2]}
        if not body["lines"]:
            return web.json_response({"ink": "Quill writes", **end})
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for piece in (b'{"ink": "Qu', b'ill"}\n\n', b'{"ink": " writes"}\r\n', json.dumps(end).encode()):
            await response.write(piece)
        return response

    async def file(self, request: web.Request) -> web.Response:
        assert "Authorization" not in request.headers
        return web.Response(body=PNG, content_type="image/png")


@pytest.fixture(scope="module")
async def vendors() -> AsyncIterator[Vendors]:
    vendors = Vendors()
    app = web.Application()
    app.router.add_post("/draw", vendors.draw)
    app.router.add_post("/write", vendors.write)
    app.router.add_post("/orders", vendors.order)
    app.router.add_get("/orders/7", vendors.state)
    app.router.add_get("/file.png", vendors.file)
    async with serve_application(app) as vendors.url:
        yield vendors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's files of the page."""
    folder = tmp_path_factory.mktemp("pomelo-crafts")
    write_package("provider-examples.md", folder)
    return folder


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip installed the package."""
    target = tmp_path_factory.mktemp("site")
    install_package(source, target)
    return target


@pytest.fixture(scope="module")
def variables(site: Path, vendors: Vendors) -> dict[str, str]:
    names = ("INK", "LOOM", "QUILL")
    return {
        "PYTHONPATH": path_with(site),
        **{f"{name}_API_KEY": KEY for name in names},
        **{f"{name}_BASE_URL": vendors.url for name in names},
    }


@pytest.fixture(scope="module")
async def served(
    variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "pomelo.toml").write_text('[providers.ink]\npaper = "cream"\n')
    async with serve(folder, **variables) as process:
        yield process


@pytest.fixture(scope="module")
async def live(served: Served, variables: dict[str, str]) -> str:
    """A live key."""
    return await live_key(served.data.parent, **variables)


async def draw(http: aiohttp.ClientSession, served: Served, key: str, **body: Any) -> tuple[str, float]:
    """Sends a task for an image; returns the response, and what it cost."""
    image = {"prompt": "A kite", "width": 512, "height": 512, "response_format": "url"}
    return await ask(http, served, key, **{**image, **body})


async def ask(http: aiohttp.ClientSession, served: Served, key: str, **body: Any) -> tuple[str, float]:
    """Sends a task; returns the response, and what it cost."""
    headers = {"Authorization": f"Bearer {key}"}
    async with http.post(f"{served.url}/api/v1/task", json=body, headers=headers) as answer:
        text = await answer.text()
        assert answer.status == 200, text
    async with http.get(f"{served.url}/api/v1/usage?page_size=1", headers=headers) as usage:
        (record,) = (await usage.json())["data"]
    assert record["model"] == body["model"]
    return text, record["cost"]


async def test_a_raw_image_is_drawn_with_the_settings_of_the_provider(
    served: Served, http: aiohttp.ClientSession, live: str, vendors: Vendors
) -> None:
    text, cost = await draw(http, served, live, model="ink-drawing", width=500, output_format="webp")
    assert vendors.requests[-1] == {
        "model": "drawing-1",
        "text": "A kite",
        "paper": "cream",
        "width": 512,
        "height": 512,
        "format": "webp",
    }
    async with http.get(json.loads(text)["data"][0]["url"]) as image:
        assert await image.read() == PNG
    assert cost == 0.02


async def test_an_order_is_polled_with_progress_and_its_image_downloaded(
    served: Served, http: aiohttp.ClientSession, live: str, vendors: Vendors
) -> None:
    async with asyncio.timeout(30):
        text, cost = await draw(http, served, live, model="loom-tapestry", seed=5, stream=True)
    assert vendors.requests[-1] == {
        "pattern": "tapestry-3",
        "text": "A kite",
        "width": 512,
        "height": 512,
        "seed": 5,
    }
    *events, done, _ = text.split("\n\n")
    objects = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [each["progress"] for each in objects[:-1]] == [0, 0.5, 1]
    assert objects[-1]["object"] == "image.generation"
    assert done == "data: [DONE]"
    assert cost == 0.013108  # 0.262144 megapixels at 0.05, rounded up


@STREAM
async def test_lines_are_a_text(
    served: Served, http: aiohttp.ClientSession, live: str, vendors: Vendors, stream: bool
) -> None:
    text, cost = await ask(
        http, served, live, **text_body("Hi", "quill-prose", max_tokens=9000, stream=stream)
    )
    assert vendors.requests[-1] == {
        "model": "prose-2",
        "pages": [{"who": "user", "text": "Hi"}],
        "most": 4000,
        "lines": stream,
    }
    if stream:
        assert re.findall(r'"content": ?"([^"]*)"', text) == ["Quill", " writes"]
        assert text.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(text)["choices"][0]["message"]["content"] == "Quill writes"
    assert cost == 0.000007  # 3 tokens at 1 for a million, and 2 at 2


@pytest.mark.timeout(300)
def test_the_packages_own_tests_run_the_provider_contract(source: Path, site: Path) -> None:
    assert run_suite(source, site, "test_crafts.py", "test_quill.py") > 220
