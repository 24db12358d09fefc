"""The worked example of docs/adding-a-provider.md: written down, installed, served and asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from tests.integration.commands import live_key, pomelo
from tests.serving import Served, serve

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-provider.md"
FILES = dict(re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
CATALOGUE = re.search(r"```toml\n(# A vLLM of ours.*?)```", PAGE.read_text(), re.DOTALL)
KEY = "acme-key-of-the-operator"


@dataclass
class Vendor:
    """Acme itself, and a vLLM."""

    url: str = ""
    asked: list[Any] = field(default_factory=list)

    async def say(self, request: web.Request) -> web.StreamResponse:
        """Acme's one method, by the words of the page."""
        body = await request.json()
        self.asked.append((request.headers["Authorization"], body))
        end = {"end": "done", "tokens": [3, 2], "cents": 0.0123}
        if not body["live"]:
            return web.json_response({"said": "Acme says", **end})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in ({"bit": "Acme"}, {"bit": " says"}, end):
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        return response

    async def me(self, request: web.Request) -> web.Response:
        """What doctor asks."""
        return web.json_response(
            {}, status=200 if request.headers["Authorization"] == f"Bearer {KEY}" else 401
        )

    async def chat(self, request: web.Request) -> web.Response:
        """A host's chat completions."""
        body = await request.json()
        self.asked.append((request.headers.get("Authorization"), body))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "vLLM says"},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        return web.json_response({"object": "chat.completion", "choices": [choice], "usage": usage})


@pytest.fixture(scope="module")
async def vendor() -> AsyncIterator[Vendor]:
    """The vendor, listening."""
    playing = Vendor()
    app = web.Application()
    app.router.add_post("/say", playing.say)
    app.router.add_get("/me", playing.me)
    app.router.add_post("/v1/chat/completions", playing.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    playing.url = "http://{}:{}".format(*runner.addresses[0])
    yield playing
    await runner.cleanup()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's folder, as the page has its files."""
    folder = tmp_path_factory.mktemp("pomelo-acme")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed into, by pip."""
    target = tmp_path_factory.mktemp("site")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", target, source], check=True
    )
    return target


@pytest.fixture(scope="module")
async def served(
    site: Path, vendor: Vendor, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    """`pomelo serve` where the package is installed, with the catalogue of the page."""
    folder = tmp_path_factory.mktemp("served")
    assert CATALOGUE is not None
    (folder / "catalog.toml").write_text(CATALOGUE[1])
    async with serve(folder, **variables(site, vendor), POMELO_CATALOG="catalog.toml") as process:
        yield process


def variables(site: Path, vendor: Vendor) -> dict[str, str]:
    """What the operator exports."""
    return {
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ACME_API_KEY": KEY,
        "ACME_BASE_URL": vendor.url,
        "VLLM_BASE_URL": vendor.url + "/v1",
    }


@pytest.fixture(scope="module")
async def live(site: Path, vendor: Vendor, served: Served) -> str:
    """A live key."""
    return await live_key(served.data.parent, **variables(site, vendor))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_plugged_in_model_answers_over_rest(
    served: Served, live: str, vendor: Vendor, stream: bool
) -> None:
    body = {
        "model": "acme-large",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 9000,
        "stop": "x",
    }
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {live}"}) as session,
        session.post(f"{served.url}/api/v1/task", json=body | {"stream": stream}) as answer,
    ):
        text = await answer.text()
        async with session.get(f"{served.url}/api/v1/usage?page_size=1") as usage:
            (record,) = (await usage.json())["data"]
    assert answer.status == 200, text
    assert (record["model"], record["provider_cost"], record["cost"]) == ("acme-large", 0.000123, 0.000123)
    assert vendor.asked[-1] == (
        f"Bearer {KEY}",
        {"model": "large-2", "lines": [{"by": "user", "says": "Hi"}], "most": 4000, "live": stream},
    )
    if stream:
        assert re.findall(r'"content": ?"([^"]*)"', text) == ["Acme", " says"]
        assert text.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(text)["choices"][0]["message"]["content"] == "Acme says"
        assert json.loads(text)["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


async def test_the_plugged_in_model_answers_over_grpc(served: Served, live: str) -> None:
    task = Task(model="acme-large", text=TextInput(messages=[Message(role=Role.ROLE_USER, content="Hi")]))
    metadata = (("authorization", f"Bearer {live}"),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        stub = TaskServiceStub(channel)
        run = stub.RunTask(RunTaskRequest(task=task), metadata=metadata)
        assert (await run).result.text.content == "Acme says"
        stream = stub.StreamTask(StreamTaskRequest(task=task), metadata=metadata)
        events = [event async for event in stream]
        for call in (run, stream):
            assert dict(await call.trailing_metadata())["x-credits-charged"] == "0.000123"
    assert "".join(event.text_delta.content for event in events) == "Acme says"
    assert events[-1].text_delta.usage.total_tokens == 5


async def test_a_test_key_gets_the_plugged_in_model_from_the_sandbox(served: Served, vendor: Vendor) -> None:
    before = len(vendor.asked)
    body = {"model": "acme-large", "messages": [{"role": "user", "content": "Hi"}]}
    async with (
        aiohttp.ClientSession(headers=served.headers) as session,
        session.post(f"{served.url}/api/v1/task", json=body) as answer,
    ):
        said = await answer.json()
    assert "sandbox" in said["choices"][0]["message"]["content"]
    assert len(vendor.asked) == before


async def test_a_model_of_the_operators_catalogue_is_answered_by_a_host_without_a_key(
    served: Served, live: str, vendor: Vendor
) -> None:
    body = {"model": "house-mixtral", "messages": [{"role": "user", "content": "Hi"}], "temperature": 2}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {live}"}) as session:
        async with session.post(f"{served.url}/api/v1/task", json=body) as answer:
            said = await answer.json()
        assert said["choices"][0]["message"]["content"] == "vLLM says"
        async with session.get(f"{served.url}/api/v1/models") as answer:
            listed = await answer.text()
    key, sent = vendor.asked[-1]
    assert key is None
    assert (sent["model"], sent["temperature"]) == ("mistralai/Mixtral-8x7B-Instruct-v0.1", 1.5)
    assert "acme-large" in listed
    assert "house-mixtral" in listed


def test_the_packages_own_tests_run_it_through_the_suite(source: Path, site: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_acme.py"],
        cwd=source,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed is not None
    assert int(passed[1]) > 50
    assert "skipped" not in ended.stdout


async def test_doctor_tells_of_the_plug_in_and_of_the_hosts(
    site: Path, vendor: Vendor, served: Served
) -> None:
    given = variables(site, vendor) | {"POMELO_CATALOG": "catalog.toml"}
    ended = await pomelo(served.data.parent, "doctor", "--json", **given)
    found = {finding["name"]: finding for finding in json.loads(ended.out)}
    assert found["acme"] == {"name": "acme", "state": "ok", "detail": f"{vendor.url} takes the key"}
    assert found["groq"]["detail"] == "GROQ_API_KEY is not set: its models need a test key"
    assert found["ollama"]["detail"] == "OLLAMA_BASE_URL is not set"
    assert found["second-vllm"]["state"] == "off"
    assert KEY not in ended.out + ended.error


async def test_a_broken_plug_in_ends_the_start_in_one_line_that_names_it(
    site: Path, vendor: Vendor, tmp_path: Path
) -> None:
    broken = tmp_path / "site"
    (broken / "pomelo_bad-1.dist-info").mkdir(parents=True)
    (broken / "pomelo_bad-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pomelo-bad\nVersion: 1\n"
    )
    (broken / "pomelo_bad-1.dist-info" / "entry_points.txt").write_text(
        "[pomelo.providers]\nbad = pomelo_bad:Bad\n"
    )
    ended = await pomelo(tmp_path, "serve", **variables(broken, vendor))
    assert ended.status == 1
    assert ended.error.startswith("pomelo: the plug-in bad (pomelo_bad:Bad) can't be loaded: ")
    assert len(ended.error.splitlines()) == 1
