"""What a caller of the added task type sees, over all protocols: run in the copy by test_task_type.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pomelo.gen.v1.moderation_pb2 import ModerationInput
from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.app import RunningApp, run_app
from tests.calls import bearer
from tests.integration.commands import pomelo

CATALOGUE = """
[models.moderator]
type = "moderation"
limits = { max_characters = 100 }
price = { thousand_characters = "1" }
price_version = "2026-11-26"
[[models.moderator.routes]]
provider = "openai"
model = "omni-moderation"
"""


@pytest.fixture(scope="module")
async def vendor() -> AsyncIterator[str]:
    """The base URL of a vendor that flags all texts with "bomb"."""

    async def moderate(request: web.Request) -> web.Response:
        text = (await request.json())["input"]
        return web.json_response({"results": [{"flagged": "bomb" in text}]})

    app = web.Application()
    app.router.add_post("/v1/moderations", moderate)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield "http://{}:{}/v1".format(*runner.addresses[0])
    await runner.cleanup()


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory, vendor: str) -> AsyncIterator[RunningApp]:
    folder: Path = tmp_path_factory.mktemp("app")
    (folder / "catalog.toml").write_text(CATALOGUE)
    settings = {"catalog": folder / "catalog.toml", "openai_base_url": vendor}
    async with run_app(folder, settings=settings) as opened:
        yield opened


async def post(running: RunningApp, protocol: str, key: str, **body: Any) -> tuple[int, str]:
    url = f"{running.urls[protocol]}/api/v1/task"
    headers = {"Authorization": f"Bearer {key}"}
    async with running.session.post(url, json={"model": "moderator", **body}, headers=headers) as answer:
        return answer.status, await answer.text()


async def ask_grpc(running: RunningApp, key: str, text: str) -> list[TaskResult]:
    """The results of a unary and of a streamed call."""
    stub = TaskServiceStub(running.channel)
    task = TaskSpec(model="moderator", moderation=ModerationInput(text=text))
    whole = (await stub.RunTask(RunTaskRequest(spec=task), metadata=bearer(key))).result
    stream = stub.StreamTask(StreamTaskRequest(spec=task), metadata=bearer(key))
    events = [response.event async for response in stream]
    assert [event.WhichOneof("event") for event in events] == ["started", "completed"]
    return [whole, events[-1].completed]


@pytest.mark.parametrize("mode", ["test", "live"])
@pytest.mark.parametrize(("text", "flagged"), [("a cake", False), ("a bomb", True)])
async def test_every_protocol_answers_and_charges_the_same(
    running: RunningApp, mode: str, text: str, flagged: bool
) -> None:
    account = await running.account()
    key = account.live if mode == "live" else account.test
    for result in await ask_grpc(running, key, text):
        assert (result.moderation.flagged, result.id[:4]) == (flagged, "mod_")
    for protocol in running.urls:
        status, answer = await post(running, protocol, key, text=text)
        assert (status, json.loads(answer)["flagged"]) == (200, flagged)
        status, stream = await post(running, protocol, key, text=text, stream=True)
        data, done = (line.removeprefix("data: ") for line in stream.split("\n\n")[:-1])
        assert json.loads(data)["object"] == "moderation.result"
        assert (status, json.loads(data)["flagged"], done) == (200, flagged, "[DONE]")
    records = await running.records(account)
    assert [record.cost for record in records] == [6_000] * 6
    assert {record.task_type for record in records} == {"moderation"}


async def test_the_command_line_prints_its_output(running: RunningApp, tmp_path: Path) -> None:
    account = await running.account()
    assert running.server.grpc is not None
    target = ("--target", running.server.grpc, "--key", account.test)
    for stream in ((), ("--stream",)):
        result = await pomelo(tmp_path, "run", "a bomb", "--model", "moderator", *target, *stream)
        assert (result.status, result.out.split()) == (0, ["flagged:", "true"])


@pytest.mark.parametrize(
    ("body", "code"), [({}, "missing_parameter"), ({"text": "a" * 101}, "context_length_exceeded")]
)
async def test_every_protocol_refuses_a_bad_text(
    running: RunningApp, body: dict[str, str], code: str
) -> None:
    account = await running.account()
    for protocol in running.urls:
        status, answer = await post(running, protocol, account.test, **body)
        assert (status, json.loads(answer)["error"]["code"]) == (400, code)
    assert not await running.records(account)


async def test_the_openapi_description_and_the_models_list_it(running: RunningApp) -> None:
    account = await running.account()
    async with running.session.get(f"{running.urls['rest']}/openapi.json") as answer:
        schemas = (await answer.json())["components"]["schemas"]
    assert schemas["ModerationTask"]["required"] == ["model", "text"]
    headers = {"Authorization": f"Bearer {account.test}"}
    async with running.session.get(f"{running.urls['remote']}/api/v1/models", headers=headers) as answer:
        models = {model["id"]: model for model in (await answer.json())["data"]}
    assert models["moderator"]["type"] == "moderation"
