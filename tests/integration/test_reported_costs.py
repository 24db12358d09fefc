"""Billing by the cost that a provider reports: OpenRouter, Black Forest Labs and a plug-in for every task type.

Unary, streamed, interrupted and truncated, on every protocol and with every store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from math import nan
from typing import Any

import pytest

from pomelo.catalog.catalog import BUILTIN, Catalog
from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageOutput, ImageProgress
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest, PriceUnit
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.speech_pb2 import AudioChunk, Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, TokenUsage
from pomelo.providers.base import Event, Job
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.sandbox import Sandbox
from pomelo.stores.usage import UsageRecord
from pomelo.testing import Answer, FaultUpstream, Gate, Stop, chunk, error_event
from pomelo.testing.bfl_protocol import Drawing, moderated
from pomelo.testing.images import make_image
from tests.app import Account, RunningApp, run_app
from tests.calls import bearer
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, PROTOCOLS, REST_PROTOCOL, STREAM, Outcome
from tests.integration.leaving import LeavingClient
from tests.redis_server import RedisServer
from tests.tasks import TASK_BODIES, text_body

CATALOGUE = """
[models.flux-drawn]
type = "image"
limits = { max_characters = 10_000 }
price = { image = "0.05", provider_dollar = "1.25" }
price_version = "2026-11-26"
[[models.flux-drawn.routes]]
provider = "bfl"
model = "flux-pro-1.1"
drop = ["num_inference_steps", "guidance_scale"]
clamp = { width = [256, 1440, 32], height = [256, 1440, 32] }

[models.mixtral-counted]
type = "text"
limits = { max_input_tokens = 10_000, max_output_tokens = 1_000 }
price = { million_input_tokens = "10", million_output_tokens = "20" }
price_version = "2026-11-26"
[[models.mixtral-counted.routes]]
provider = "openrouter"
model = "counted"
"""

ACME = """
[models.{name}]
type = "{task_type}"
limits = {limits}
price = {{ {price}, provider_dollar = "1.1" }}
price_version = "2026-11-26"
[[models.{name}.routes]]
provider = "{first}"
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
COUNTS = TokenUsage(prompt_tokens=30, completion_tokens=40, total_tokens=70)
STOP = FinishReason.FINISH_REASON_STOP
EVENTS: dict[str, list[Event]] = {
    "text": [
        Event(text_delta=TextDelta(content="one ")),
        Event(text_delta=TextDelta(content="two", finish_reason=STOP, usage=COUNTS)),
    ],
    "image": [
        Event(image_progress=ImageProgress(progress=0.5)),
        Event(
            result=TaskResult(
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
    "stt": [Event(result=TaskResult(transcription=Transcription(text="Hello.", audio_seconds=1.5)))],
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
class Rig:
    """A server, a fake vendor in place of OpenRouter and Black Forest Labs, and the plug-ins of two routes."""

    app: RunningApp
    vendor: FaultUpstream
    first: Acme = field(default_factory=Acme)
    acme: Acme = field(default_factory=Acme)

    async def record(self, caller: Account, response: Outcome) -> UsageRecord:
        """The only record of a caller; nothing else was charged or reported."""
        (record,) = await self.app.records(caller)
        assert (await self.app.balance(caller, live=True)).spent == record.cost
        if "x-credits-charged" in response.metadata:
            assert round(float(response.metadata["x-credits-charged"]) * 10**6) == record.cost
        await self.app.assert_audit_clean()
        return record


@pytest.fixture(scope="module", name="rig", params=["sqlite", "redis"])
async def _rig(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Rig]:
    folder = tmp_path_factory.mktemp("reported")
    (folder / "catalog.toml").write_text(CATALOGUE)
    async with AsyncExitStack() as stack:
        vendor = await stack.enter_async_context(FaultUpstream())
        settings: dict[str, Any] = {
            "catalog": folder / "catalog.toml",
            "mistral_api_key": None,
            "openrouter_api_key": "o-x",
            "openrouter_base_url": vendor.openai_base_url,
            "bfl_base_url": vendor.bfl_base_url,
        }
        if request.param == "redis":
            settings["store"] = stack.enter_context(RedisServer()).url
        yield Rig(await stack.enter_async_context(run_app(folder, settings=settings)), vendor)


@pytest.fixture(scope="module", name="plugged", params=["sqlite", "redis"])
async def _plugged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Rig]:
    """A server whose models are served by plug-ins. The route before Acme's fails."""
    folder = tmp_path_factory.mktemp("plugged")
    rows = [
        ACME.format(
            name=f"{TASK_BODIES[name]['model']}-acme",
            task_type=task_type,
            limits=limits,
            price=price,
            first="first",
        )
        for name, (task_type, limits, price) in TYPES.items()
    ]
    (folder / "catalog.toml").write_text("".join(rows))
    first, acme = Acme(), Acme()
    async with AsyncExitStack() as stack:
        settings: dict[str, Any] = {}
        if request.param == "redis":
            settings["store"] = stack.enter_context(RedisServer()).url
        app = await stack.enter_async_context(
            run_app(
                folder,
                settings=settings,
                catalog=Catalog.load(BUILTIN, folder / "catalog.toml"),
                providers={"sandbox": Sandbox(), "first": first, "acme": acme},
            )
        )
        yield Rig(app, app.upstream, first, acme)


@pytest.fixture(autouse=True)
def _broken(request: pytest.FixtureRequest) -> None:
    if "plugged" in request.fixturenames:
        request.getfixturevalue("plugged").first.act = failing()


def answering(task_name: str, *costs: Any) -> Callable[[Job[Any]], AsyncIterator[Event]]:
    """An action that answers, and reports a cost before each event."""

    async def act(job: Job[Any]) -> AsyncIterator[Event]:
        events = EVENTS[task_name]
        if task_name == "text" and not job.stream:
            events = [Event(text_delta=TextDelta(content="one two", finish_reason=STOP, usage=COUNTS))]
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


def counts(cost: Any, **more: Any) -> dict[str, Any]:
    """Usage in the format of OpenRouter."""
    return {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500, "cost": cost, **more}


TRUNCATED = (error_event("strange"), Stop.END)
"""A failure within a stream. Unlike a broken connection, it does not discard the bytes before it."""

COST_BY_COUNTS = 810
"""The microcredits of `counts` by the prices of mixtral-8x7b at OpenRouter."""


# --- the adapters


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    ("cost", "micros"), [(0.00042, 420), (0.0004201, 421), (1e-9, 1), (0.0011, 1_100), (0.0123, 12_300)]
)
async def test_a_text_of_openrouter_costs_the_reported_cost(
    rig: Rig, cost: float, micros: int, protocol: str, stream: bool
) -> None:
    caller = await rig.app.account()
    prompt = f"<{cost}> {protocol} {stream}"
    rig.vendor.when(prompt, Answer("one two", usage=counts(cost)))
    response = await rig.app.ask(protocol, caller.live, text_body(prompt, "mixtral-8x7b"), stream=stream)
    assert response.code == "ok"
    record = await rig.record(caller, response)
    assert (record.cost, record.provider_micros) == (micros, micros)
    assert (record.input_tokens, record.output_tokens, record.source) == (1_000, 500, "provider")
    assert record.prices.endswith("provider_dollar=1000000")


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    "cost",
    [None, 0, 0.0, -0.01, "0.01", True, [], {}, 10**6, 1e300],
    ids=repr,
)
@pytest.mark.parametrize("model", ["mixtral-8x7b", "mixtral-counted"])
async def test_without_a_possible_cost_the_counts_are_billed(
    rig: Rig, model: str, cost: Any, protocol: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await rig.app.account()
    prompt = f"<{model} {cost!r}> {protocol} {stream}"
    rig.vendor.when(prompt, Answer("one two", usage=counts(cost)))
    with caplog.at_level(logging.WARNING, "pomelo"):
        response = await rig.app.ask(protocol, caller.live, text_body(prompt, model), stream=stream)
    assert response.code == "ok"
    record = await rig.record(caller, response)
    assert (record.cost, record.provider_micros) == (
        20_000 if model == "mixtral-counted" else COST_BY_COUNTS,
        0,
    )
    expected = model == "mixtral-8x7b" and cost not in (None, 0)
    assert caplog.text.count("reported an impossible cost") == expected


async def test_a_cost_that_is_only_the_fee_of_the_host_is_not_billed(rig: Rig) -> None:
    caller = await rig.app.account()
    rig.vendor.when("own key", Answer("one two", usage=counts(0.00001, is_byok=True)))
    response = await rig.app.ask("rest", caller.live, text_body("own key", "mixtral-8x7b"))
    assert (await rig.record(caller, response)).cost == COST_BY_COUNTS


@PROTOCOL
async def test_a_stream_truncated_after_the_reported_cost_costs_that(rig: Rig, protocol: str) -> None:
    caller = await rig.app.account()
    prompt = f"cut {protocol}"
    steps = (chunk(None, usage=counts(0.0005)), *TRUNCATED)
    rig.vendor.when(prompt, Answer("one two three", at={2: steps}))
    response = await rig.app.ask(protocol, caller.live, text_body(prompt, "mixtral-8x7b"), stream=True)
    assert response.code == "provider_failed"
    record = await rig.record(caller, response)
    assert (record.cost, record.provider_micros, record.complete) == (500, 500, False)


@PROTOCOL
async def test_a_stream_truncated_before_the_reported_cost_costs_the_delivered_part(
    rig: Rig, protocol: str
) -> None:
    caller = await rig.app.account()
    prompt = f"cut early {protocol}"
    rig.vendor.when(prompt, Answer("one two three", at={2: TRUNCATED}, usage=counts(0.0005)))
    response = await rig.app.ask(protocol, caller.live, text_body(prompt, "mixtral-8x7b"), stream=True)
    assert response.code == "provider_failed"
    record = await rig.record(caller, response)
    assert (record.provider_micros, record.output_tokens, record.complete) == (0, 2, False)
    assert 0 < record.cost < 500


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    ("reported_credits", "micros"),
    [(4.0, 50_000), (2.5, 31_250), (1, 12_500), (1.1, 13_750), (4.1, 50_000), (0, 50_000), ("2", 50_000)],
)
async def test_an_image_of_black_forest_labs_costs_the_reported_cost(
    rig: Rig, reported_credits: Any, micros: int, protocol: str, stream: bool
) -> None:
    caller = await rig.app.account()
    body = TASK_BODIES["image"] | {"model": "flux-drawn"}
    rig.vendor.script(Drawing(order={"cost": reported_credits}))
    response = await rig.app.ask(protocol, caller.live, body, stream=stream)
    assert response.code == "ok"
    record = await rig.record(caller, response)
    assert (record.cost, record.images) == (micros, 1)
    assert record.provider_micros in (0, micros * 4 // 5)


@PROTOCOL_AND_STREAM
async def test_an_image_refused_after_its_cost_was_reported_costs_nothing(
    rig: Rig, protocol: str, stream: bool
) -> None:
    caller = await rig.app.account()
    body = TASK_BODIES["image"] | {"model": "flux-drawn"}
    rig.vendor.script(Drawing(polls=(moderated(),), done=False))
    response = await rig.app.ask(protocol, caller.live, body, stream=stream)
    assert response.code == "content_policy_violation"
    assert await rig.app.records(caller) == []
    assert (await rig.app.balance(caller, live=True)).spent == 0


async def test_an_image_with_a_fixed_price_ignores_the_reported_cost(rig: Rig) -> None:
    caller = await rig.app.account()
    rig.vendor.script(Drawing(order={"cost": 1.0}))
    response = await rig.app.ask("rest", caller.live, TASK_BODIES["image"])
    assert response.metadata["x-credits-charged"] == "0.04"
    record = await rig.record(caller, response)
    assert (record.cost, record.provider_micros) == (40_000, 0)


async def test_a_test_key_pays_by_counts(rig: Rig) -> None:
    caller = await rig.app.account()
    response = await rig.app.ask("rest", caller.test, TASK_BODIES["image"] | {"model": "flux-drawn"})
    assert response.metadata["x-credits-charged"] == "0.05"


async def test_reported_costs_and_their_price_are_listed(rig: Rig) -> None:
    app = rig.app
    caller = await app.account()
    rig.vendor.when("shown", Answer("one two", usage=counts(0.0123456)))
    await app.ask("rest", caller.live, text_body("shown", "mixtral-8x7b"))
    for protocol in ("rest", "remote"):
        (row,) = (await app.get_json(protocol, caller.live, "/api/v1/usage"))["data"]
        assert (row["provider_cost"], row["cost"]) == (0.012346, 0.012346)
        listed = (await app.get_json(protocol, caller.live, "/api/v1/models"))["data"]
        (model,) = [m for m in listed if m["id"] == "flux-drawn"]
        assert model["price"] == {"image": "0.05", "provider_dollar": "1.25"}
    metadata = bearer(caller.live)
    usage = await AccountServiceStub(app.channel).ListUsage(ListUsageRequest(), metadata=metadata)
    assert usage.records[0].provider_cost_micros == 12_346
    models = await ModelServiceStub(app.channel).ListModels(ListModelsRequest(), metadata=metadata)
    (draw,) = [model for model in models.models if model.name == "flux-drawn"]
    prices = {price.unit: price.amount_micros for price in draw.prices}
    assert prices[PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR] == 1_250_000


# --- plug-ins


def task(task_name: str) -> dict[str, Any]:
    """A task for the plug-in's model."""
    return TASK_BODIES[task_name] | {"model": f"{TASK_BODIES[task_name]['model']}-acme"}


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("task_name", TYPES)
async def test_a_plug_in_of_any_task_type_is_billed_by_the_reported_cost(
    plugged: Rig, task_name: str, protocol: str, stream: bool
) -> None:
    caller = await plugged.app.account()
    plugged.acme.act = (
        answering(task_name, 0.0005, 0.0002) if stream else answering(task_name, 0.0002, 0.0002)
    )
    response = await plugged.app.ask(protocol, caller.live, task(task_name), stream=stream)
    assert response.code == "ok"
    record = await plugged.record(caller, response)
    cost = 500 if stream and task_name == "stt" else 200  # its only event
    assert (record.provider, record.provider_micros, record.cost) == ("acme", cost, cost * 11 // 10)


@REST_PROTOCOL
@pytest.mark.parametrize(("task_name", "accept"), [("image", "image/*"), ("tts", "audio/*")])
async def test_the_reported_cost_of_raw_media_is_the_charged_cost(
    plugged: Rig, task_name: str, accept: str, protocol: str
) -> None:
    caller = await plugged.app.account()
    plugged.acme.act = answering(task_name, 0.0002)
    response = await plugged.app.ask(protocol, caller.live, task(task_name), accept=accept)
    assert response.status == 200
    assert (await plugged.record(caller, response)).cost == 220


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    "cost", [-1, nan, "1", 10**9, object()], ids=["-1", "nan", "text", "10**9", "object"]
)
async def test_an_invalid_cost_of_a_plug_in_is_ignored_and_logged_without_its_text(
    plugged: Rig, cost: Any, protocol: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await plugged.app.account()
    plugged.acme.act = answering("image", cost, cost)
    with caplog.at_level(logging.WARNING, "pomelo"):
        response = await plugged.app.ask(
            protocol, caller.live, task("image"), stream=stream, headers={"X-Request-Id": f"id-{protocol}"}
        )
    assert response.code == "ok"
    record = await plugged.record(caller, response)
    assert (record.cost, record.provider_micros) == (40_000, 0)
    (line,) = [message for message in caplog.messages if "impossible cost" in message]
    assert line.startswith(f"request id-{protocol}: the provider acme reported an impossible cost")


@PROTOCOL_AND_STREAM
async def test_the_cost_of_a_failed_attempt_is_not_billed(plugged: Rig, protocol: str, stream: bool) -> None:
    caller = await plugged.app.account()
    plugged.first.act = failing(0.03)
    attempts = [failing(0.02, RetryPolicy.SAME_ROUTE), answering("image")]
    plugged.acme.act = lambda job: attempts.pop(0)(job)
    response = await plugged.app.ask(protocol, caller.live, task("image"), stream=stream)
    assert response.code == "ok"
    assert not attempts
    record = await plugged.record(caller, response)
    assert (record.provider, record.cost, record.provider_micros) == ("acme", 40_000, 0)


@PROTOCOL_AND_STREAM
async def test_the_cost_of_the_attempt_that_answers_is_billed(
    plugged: Rig, protocol: str, stream: bool
) -> None:
    caller = await plugged.app.account()
    plugged.first.act = failing(0.03)
    attempts = [failing(0.02, RetryPolicy.SAME_ROUTE), answering("image", 0.01)]
    plugged.acme.act = lambda job: attempts.pop(0)(job)
    response = await plugged.app.ask(protocol, caller.live, task("image"), stream=stream)
    assert (await plugged.record(caller, response)).cost == 11_000


@STREAM
async def test_a_task_that_fails_after_a_report_costs_nothing(plugged: Rig, stream: bool) -> None:
    caller = await plugged.app.account()
    plugged.acme.act = failing(0.01, RetryPolicy.NEVER)
    response = await plugged.app.ask("rest", caller.live, task("image"), stream=stream)
    assert response.code == "provider_unavailable"
    assert await plugged.app.records(caller) == []


@PROTOCOL
async def test_an_interrupted_stream_costs_the_cost_reported_so_far(plugged: Rig, protocol: str) -> None:
    caller = await plugged.app.account()
    gate = Gate()

    async def act(job: Job[Any]) -> AsyncIterator[Event]:
        job.report.cost = 0.0007
        yield Event(text_delta=TextDelta(content="one "))
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
    record = await plugged.record(caller, Outcome())
    assert (record.cost, record.provider_micros, record.complete) == (770, 700, False)


async def test_concurrent_tasks_on_the_balance_of_one_leave_nothing_uncollected(plugged: Rig) -> None:
    caller = await plugged.app.account(live=40_000)
    plugged.acme.act = answering("image", 0.0363636363, 0.0363636363)  # with its markup the whole reservation
    requests = [plugged.app.ask(protocol, caller.live, task("image")) for protocol in PROTOCOLS * 7]
    codes = [response.code for response in await asyncio.gather(*requests)]
    assert set(codes) == {"ok", "insufficient_credits"}
    records = await plugged.app.records(caller)
    assert [record.uncollected for record in records] == [0] * codes.count("ok")
