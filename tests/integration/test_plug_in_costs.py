"""Billing by the cost that a plug-in's vendor reports, for every task type: unary, streamed and interrupted, on every
protocol and with every store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from math import nan
from typing import Any

import pytest

from pomelo.catalog.catalog import BUILTIN, Catalog
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageOutput, ImageProgress
from pomelo.gen.v1.speech_pb2 import AudioChunk, Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import ContentPart, FinishReason, Message, Role, TextDelta, TextOutput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event, Job
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.sandbox import Sandbox
from pomelo.testing import Gate
from pomelo.testing.images import make_image
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, PROTOCOLS, REST_PROTOCOL, STREAM
from tests.integration.leaving import LeavingClient
from tests.tasks import TASK_BODIES

ACME = """
[models.{name}]
type = "{task_type}"
limits = {limits}
price = {{ {price}, provider_dollar = "1.1" }}
price_version = "2026-11-26"
[[models.{name}.routes]]
provider = "first"
model = "m"
[[models.{name}.routes]]
provider = "acme"
model = "m"
"""

TEXT_LIMITS = "{ max_input_tokens = 10_000, max_output_tokens = 1_000 }"
AUDIO_LIMITS = "{ max_audio_seconds = 300 }"
TYPES = {
    "text": ("text", TEXT_LIMITS, 'million_input_tokens = "100", million_output_tokens = "100"'),
    "image": ("image", "{ max_characters = 10_000 }", 'image = "0.04"'),
    "tts": ("text_to_speech", "{ max_characters = 10_000 }", 'thousand_characters = "1"'),
    "sts": ("speech_to_speech", AUDIO_LIMITS, 'audio_minute = "1"'),
    "stt": ("speech_to_text", AUDIO_LIMITS, 'audio_minute = "1"'),
}
"""Name of a task in TASK_BODIES -> its type, limits and price by counts."""

AUDIO = b"\xff\xfb\x90\xc0" + b"audio" * 200


def completed_text(text: str) -> Event:
    """The end of a text, with the text that no delta had."""
    message = Message(role=Role.ROLE_ASSISTANT, content=[ContentPart(text=text)])
    output = TextOutput(message=message, finish_reason=FinishReason.FINISH_REASON_STOP)
    return Event(completed=TaskResult(text=output, usage=Usage(input_tokens=30, output_tokens=40)))


EVENTS: dict[str, list[Event]] = {
    "text": [
        Event(text_delta=TextDelta(text="one ")),
        completed_text("two"),
    ],
    "image": [
        Event(image_progress=ImageProgress(progress=0.5)),
        Event(
            completed=TaskResult(
                image=ImageOutput(images=[GeneratedImage(data=make_image("png"), content_type="image/png")])
            )
        ),
    ],
    "tts": [
        Event(audio_chunk=AudioChunk(data=AUDIO, content_type="audio/mpeg")),
        Event(audio_chunk=AudioChunk(data=AUDIO)),
    ],
    "sts": [
        Event(audio_chunk=AudioChunk(data=AUDIO, content_type="audio/mpeg")),
        Event(audio_chunk=AudioChunk(data=AUDIO)),
    ],
    "stt": [Event(completed=TaskResult(transcription=Transcription(text="Hello.", audio_seconds=1.5)))],
}


class Acme:
    """A provider of a plug-in, whose vendor reports the cost of each request."""

    configured = True

    def __init__(self) -> None:
        self.act: Callable[[Job[Any]], AsyncIterator[Event]]
        self.text = self.image = self.text_to_speech = self.speech_to_speech = self.speech_to_text = self._act

    def _act(self, job: Job[Any]) -> Any:
        return self.act(job)

    async def aclose(self) -> None:
        pass


@dataclass
class Plugged:
    """An app whose models are served by two plug-ins: `first`, and then `acme`."""

    app: RunningApp
    first: Acme
    acme: Acme


@pytest.fixture(scope="module", name="opened")
async def _opened(
    store_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Plugged]:
    folder = tmp_path_factory.mktemp("plugged")
    rows = [
        ACME.format(name=f"{TASK_BODIES[name]['model']}-acme", task_type=of, limits=limits, price=price)
        for name, (of, limits, price) in TYPES.items()
    ]
    (folder / "catalog.toml").write_text("".join(rows))
    first, acme = Acme(), Acme()
    async with run_app(
        folder,
        settings=store_settings,
        catalog=Catalog.load(BUILTIN, folder / "catalog.toml"),
        providers={"sandbox": Sandbox(), "first": first, "acme": acme},
    ) as app:
        yield Plugged(app, first, acme)


@pytest.fixture
def plugged(opened: Plugged) -> Plugged:
    """The app; its first plug-in fails."""
    opened.first.act = failing()
    return opened


def answering(task_name: str, *costs: Any) -> Callable[[Job[Any]], AsyncIterator[Event]]:
    """An action that answers, and reports a cost before each event."""

    async def act(job: Job[Any]) -> AsyncIterator[Event]:
        events = EVENTS[task_name]
        if task_name == "text" and not job.stream:
            events = [completed_text("one two")]
        elif task_name == "image" and not job.stream:
            events = events[1:]
        for cost, event in zip((*costs, *[None] * len(events)), events, strict=False):
            if cost is not None:
                job.report.cost = cost
            copied = Event()
            copied.CopyFrom(event)
            yield copied

    return act


def failing(
    cost: Any = None, retry: RetryPolicy = RetryPolicy.NEXT_ROUTE
) -> Callable[[Job[Any]], AsyncIterator[Event]]:
    """An action that reports a cost and fails before the first event."""

    async def act(job: Job[Any]) -> AsyncIterator[Event]:
        job.report.cost = cost
        raise UpstreamError("provider_unavailable", retry=retry, wait=0)
        yield Event()

    return act


def task(task_name: str) -> dict[str, Any]:
    """A task for the plug-in's model."""
    return TASK_BODIES[task_name] | {"model": f"{TASK_BODIES[task_name]['model']}-acme"}


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("task_name", TYPES)
async def test_a_plug_in_of_any_task_type_is_billed_by_the_reported_cost(
    plugged: Plugged, task_name: str, protocol: str, stream: bool
) -> None:
    caller = await plugged.app.account()
    plugged.acme.act = (
        answering(task_name, 0.0005, 0.0002) if stream else answering(task_name, 0.0002, 0.0002)
    )
    response = await plugged.app.ask(protocol, caller.live, task(task_name), stream=stream)
    assert response.code == "ok"
    record = await plugged.app.only_record(caller, response)
    cost = 500 if stream and task_name == "stt" else 200  # its only event
    assert (record.provider, record.provider_micros, record.cost) == ("acme", cost, cost * 11 // 10)


@REST_PROTOCOL
@pytest.mark.parametrize(("task_name", "accept"), [("image", "image/*"), ("tts", "audio/*")])
async def test_the_reported_cost_of_raw_media_is_the_charged_cost(
    plugged: Plugged, task_name: str, accept: str, protocol: str
) -> None:
    caller = await plugged.app.account()
    plugged.acme.act = answering(task_name, 0.0002)
    response = await plugged.app.ask(protocol, caller.live, task(task_name), accept=accept)
    assert response.status == 200
    assert (await plugged.app.only_record(caller, response)).cost == 220


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    "cost", [-1, nan, "1", 10**9, object()], ids=["-1", "nan", "text", "10**9", "object"]
)
async def test_an_invalid_cost_of_a_plug_in_is_ignored_and_logged_without_its_text(
    plugged: Plugged, cost: Any, protocol: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await plugged.app.account()
    plugged.acme.act = answering("image", cost, cost)
    with caplog.at_level(logging.WARNING, "pomelo"):
        response = await plugged.app.ask(
            protocol, caller.live, task("image"), stream=stream, headers={"X-Request-Id": f"id-{protocol}"}
        )
    assert response.code == "ok"
    record = await plugged.app.only_record(caller, response)
    assert (record.cost, record.provider_micros) == (40_000, 0)
    (line,) = [message for message in caplog.messages if "impossible cost" in message]
    assert line.startswith(f"request id-{protocol}: the provider acme reported an impossible cost")


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    ("costs", "billed"),
    [((), (40_000, 0)), ((0.01,), (11_000, 10_000))],
    ids=["only failed attempts report", "the last attempt reports"],
)
async def test_only_the_cost_of_the_attempt_that_answers_is_billed(
    plugged: Plugged, costs: tuple[float, ...], billed: tuple[int, int], protocol: str, stream: bool
) -> None:
    caller = await plugged.app.account()
    plugged.first.act = failing(0.03)
    attempts = [failing(0.02, RetryPolicy.SAME_ROUTE), answering("image", *costs)]
    plugged.acme.act = lambda job: attempts.pop(0)(job)
    response = await plugged.app.ask(protocol, caller.live, task("image"), stream=stream)
    assert response.code == "ok"
    assert not attempts
    record = await plugged.app.only_record(caller, response)
    assert (record.provider, record.cost, record.provider_micros) == ("acme", *billed)


@STREAM
async def test_a_task_that_fails_after_a_report_costs_nothing(plugged: Plugged, stream: bool) -> None:
    caller = await plugged.app.account()
    plugged.acme.act = failing(0.01, RetryPolicy.NEVER)
    response = await plugged.app.ask("rest", caller.live, task("image"), stream=stream)
    assert response.code == "provider_unavailable"
    assert await plugged.app.records(caller) == []


@PROTOCOL
async def test_an_interrupted_stream_costs_the_cost_reported_so_far(plugged: Plugged, protocol: str) -> None:
    caller = await plugged.app.account()
    gate = Gate()

    async def act(job: Job[Any]) -> AsyncIterator[Event]:
        job.report.cost = 0.0007
        yield Event(text_delta=TextDelta(text="one "))
        await gate.pass_through()

    plugged.acme.act = act
    client = LeavingClient(plugged.app, protocol, caller.live, task("text"), stream=True)
    await client.has(1)
    store = plugged.app.server.store
    for _ in range(100):  # the cost in case of a crash is stored every second
        noted = [record.cost for record in await store.drafts() if record.account == caller.name]
        if noted == [770]:
            break
        await asyncio.sleep(0.05)
    assert noted == [770]
    await client.leave()
    await plugged.app.idle(caller, live=True)
    record = await plugged.app.only_record(caller)
    assert (record.cost, record.provider_micros, record.complete) == (770, 700, False)


async def test_concurrent_tasks_on_the_balance_of_one_leave_nothing_uncollected(plugged: Plugged) -> None:
    caller = await plugged.app.account(live=40_000)
    plugged.acme.act = answering("image", 0.0363636363, 0.0363636363)  # with its markup the whole reservation
    requests = [plugged.app.ask(protocol, caller.live, task("image")) for protocol in PROTOCOLS * 7]
    codes = [response.code for response in await asyncio.gather(*requests)]
    assert set(codes) == {"ok", "insufficient_credits"}
    records = await plugged.app.records(caller)
    assert [record.uncollected for record in records] == [0] * codes.count("ok")
