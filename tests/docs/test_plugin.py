"""The examples of docs/adding-a-provider.md and docs/catalogue.md: written to files, installed, served and called."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from pomelo.catalog.task_types import TASK_TYPE_ROWS
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import bearer
from tests.docs.packages import DOCS, install_package, path_with, run_suite, write_package
from tests.driver import STREAM, TaskRequest
from tests.integration.commands import live_key, pomelo
from tests.rest_driver import RestDriver
from tests.serving import Served, serve
from tests.tasks import text_body, text_task
from tests.web_server import serve_application

PAGE = DOCS / "adding-a-provider.md"
CATALOGUE = re.search(r"```toml\n(# A vLLM of ours.*?)```", (DOCS / "catalogue.md").read_text(), re.DOTALL)
KEY = "acme-key-of-the-operator"


@dataclass
class Vendor:
    """The API of Acme, and of a vLLM."""

    url: str = ""
    requests: list[Any] = field(default_factory=list)

    async def say(self, request: web.Request) -> web.StreamResponse:
        """Acme's only method, with the fields of the page."""
        body = await request.json()
        self.requests.append((request.headers["Authorization"], body))
        end = {"end": "done", "tokens": [3, 2], "cents": 0.0123}
        if not body["live"]:
            return web.json_response({"said": "Acme says", **end})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in ({"bit": "Acme"}, {"bit": " says"}, end):
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        return response

    async def me(self, request: web.Request) -> web.Response:
        """The request of pomelo doctor."""
        valid = request.headers["Authorization"] == f"Bearer {KEY}"
        return web.json_response({}, status=200 if valid else 401)

    async def chat(self, request: web.Request) -> web.Response:
        """Chat completions of vLLM."""
        body = await request.json()
        self.requests.append((request.headers.get("Authorization"), body))
        message = {"role": "assistant", "content": "vLLM says"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        return web.json_response({"object": "chat.completion", "choices": [choice], "usage": usage})


@pytest.fixture(scope="module")
async def vendor() -> AsyncIterator[Vendor]:
    """The running vendor."""
    vendor = Vendor()
    app = web.Application()
    app.router.add_post("/say", vendor.say)
    app.router.add_get("/me", vendor.me)
    app.router.add_post("/v1/chat/completions", vendor.chat)
    async with serve_application(app) as vendor.url:
        yield vendor


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's files of the page."""
    folder = tmp_path_factory.mktemp("pomelo-acme")
    write_package(PAGE.name, folder)
    return folder


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip installed the package."""
    target = tmp_path_factory.mktemp("site")
    install_package(source, target)
    return target


@pytest.fixture(scope="module")
async def served(
    site: Path, vendor: Vendor, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    """A server with the package and the catalogue of the page."""
    folder = tmp_path_factory.mktemp("served")
    assert CATALOGUE is not None
    (folder / "catalog.toml").write_text(CATALOGUE[1])
    async with serve(folder, **variables(site, vendor), POMELO_CATALOG="catalog.toml") as process:
        yield process


def variables(site: Path, vendor: Vendor) -> dict[str, str]:
    """The operator's variables."""
    return {
        "PYTHONPATH": path_with(site),
        "ACME_API_KEY": KEY,
        "ACME_BASE_URL": vendor.url,
        "VLLM_BASE_URL": vendor.url + "/v1",
    }


@pytest.fixture(scope="module")
async def live(site: Path, vendor: Vendor, served: Served) -> str:
    """A live key."""
    return await live_key(served.data.parent, **variables(site, vendor))


@STREAM
async def test_the_model_of_the_plug_in_answers_over_rest(
    served: Served, http: aiohttp.ClientSession, live: str, vendor: Vendor, stream: bool
) -> None:
    headers = {"Authorization": f"Bearer {live}"}
    body = text_body("Hi", "acme-large", max_tokens=9000, stop="x", stream=stream)
    async with http.post(f"{served.url}/api/v1/task", json=body, headers=headers) as answer:
        text = await answer.text()
    async with http.get(f"{served.url}/api/v1/usage?page_size=1", headers=headers) as usage:
        (record,) = (await usage.json())["data"]
    assert answer.status == 200, text
    assert (record["model"], record["provider_cost"], record["cost"]) == ("acme-large", 0.000123, 0.000123)
    assert vendor.requests[-1] == (
        f"Bearer {KEY}",
        {"model": "large-2", "lines": [{"by": "user", "says": "Hi"}], "most": 4000, "live": stream},
    )
    if stream:
        assert re.findall(r'"content": ?"([^"]*)"', text) == ["Acme", " says"]
        assert text.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(text)["choices"][0]["message"]["content"] == "Acme says"
        assert json.loads(text)["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


async def test_the_model_of_the_plug_in_answers_over_grpc(served: Served, live: str) -> None:
    spec, metadata = text_task("Hi", "acme-large"), bearer(live)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        stub = TaskServiceStub(channel)
        run = stub.RunTask(RunTaskRequest(spec=spec), metadata=metadata)
        (part,) = (await run).result.text.message.content
        assert part.text == "Acme says"
        stream = stub.StreamTask(StreamTaskRequest(spec=spec), metadata=metadata)
        events = [response.event async for response in stream]
        for call in (run, stream):
            assert dict(await call.trailing_metadata())["x-credits-charged"] == "0.000123"
    assert "".join(event.text_delta.text for event in events) == "Acme says"
    usage = events[-1].completed.usage
    assert (usage.input_tokens, usage.output_tokens) == (3, 2)


async def test_with_a_test_key_the_sandbox_answers_for_the_plug_in(
    served: Served, http: aiohttp.ClientSession, vendor: Vendor
) -> None:
    before = len(vendor.requests)
    request = TaskRequest(text_body("Hi", "acme-large"), served.key)
    assert "sandbox" in (await RestDriver(http, served.url)(request)).content
    assert len(vendor.requests) == before


async def test_a_model_of_the_operators_catalogue_uses_a_host_without_a_key(
    served: Served, http: aiohttp.ClientSession, live: str, vendor: Vendor
) -> None:
    request = TaskRequest(text_body("Hi", "our-mixtral", temperature=2), live)
    assert (await RestDriver(http, served.url)(request)).content == "vLLM says"
    headers = {"Authorization": f"Bearer {live}"}
    async with http.get(f"{served.url}/api/v1/models", headers=headers) as answer:
        listed = await answer.text()
    key, sent = vendor.requests[-1]
    assert key is None
    assert (sent["model"], sent["temperature"]) == ("mistralai/Mixtral-8x7B-Instruct-v0.1", 1.5)
    assert "acme-large" in listed
    assert "our-mixtral" in listed


def test_the_packages_own_tests_run_the_provider_contract(source: Path, site: Path) -> None:
    assert run_suite(source, site, "test_acme.py") > 50


async def test_doctor_reports_the_plug_in_and_the_hosts(site: Path, vendor: Vendor, served: Served) -> None:
    given = variables(site, vendor) | {"POMELO_CATALOG": "catalog.toml"}
    result = await pomelo(served.data.parent, "doctor", "--json", **given)
    found = {finding["name"]: finding for finding in json.loads(result.out)}
    assert found["acme"] == {"name": "acme", "state": "ok", "detail": f"{vendor.url} takes the key"}
    assert found["groq"]["detail"] == "GROQ_API_KEY is not set: its models work with test keys only"
    assert found["ollama"]["detail"] == "OLLAMA_BASE_URL is not set"
    assert found["second-vllm"]["state"] == "off"
    assert KEY not in result.out + result.error


def test_the_page_has_the_limits_units_and_events_of_each_task_type() -> None:
    rows = {}
    for line in (DOCS / "provider-interface.md").read_text().splitlines():
        cells = [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[0] and cells[0][0] in TASK_TYPE_ROWS:
            rows[cells[0][0]] = cells[1:]
    expected = {
        name: [
            *([name], list(row.limits), list(row.price_units)),
            sorted(row.events, key=lambda event: (event == "completed", event)),
        ]
        for name, row in TASK_TYPE_ROWS.items()
    }
    assert rows == expected
