"""Bills by what a provider reports that a task cost: of OpenRouter and Black Forest Labs by their adapters, and of a
plug-in for every type of task; whole, streamed, left and cut, over every protocol and store."""

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
from pomelo.errors import PomeloError, Replay
from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageOutput, ImageProgress
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest, PriceUnit
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.speech_pb2 import AudioChunk, Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, TokenUsage
from pomelo.providers.base import Event, Job
from pomelo.providers.sandbox import Sandbox
from pomelo.stores.ledger import UsageRecord
from pomelo.testing import Answer, FaultUpstream, Gate, Stop, chunk, error_event
from pomelo.testing.bfl_wire import Drawing, moderated
from pomelo.testing.pictures import picture
from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOLS, Outcome
from tests.integration.leaving import LeavingClient
from tests.redis_server import RedisServer
from tests.tasks import TASK_BODIES, text_body

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])

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
type = "{kind}"
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

OF_TEXT = "{ max_input_tokens = 10_000, max_output_tokens = 1_000 }"
OF_SOUND = "{ max_audio_seconds = 300 }"
TYPES = {
    "text": ("text", OF_TEXT, 'million_input_tokens = "100", million_output_tokens = "100"'),
    "image": ("image", "{ max_characters = 10_000 }", 'image = "0.04"'),
    "tts": ("text_to_speech", "{ max_characters = 10_000 }", 'thousand_characters = "1"'),
    "sts": ("speech_to_speech", OF_SOUND, 'audio_minute = "1"'),
    "stt": ("speech_to_text", OF_SOUND, 'audio_minute = "1"'),
}
"""Name of a task in TASK_BODIES -> its type, limits and price by counts."""

SOUND = b"\xff\xfb\x90\xc0" + b"sound" * 200
COUNTS = TokenUsage(prompt_tokens=30, completion_tokens=40, total_tokens=70)
STOP = FinishReason.FINISH_REASON_STOP
GOOD: dict[str, list[Event]] = {
    "text": [
        Event(text_delta=TextDelta(content="one ")),
        Event(text_delta=TextDelta(content="two", finish_reason=STOP, usage=COUNTS)),
    ],
    "image": [
        Event(image_progress=ImageProgress(progress=0.5)),
        Event(
            result=TaskResult(
                image=ImageOutput(images=[GeneratedImage(data=picture("png"), content_type="image/png")])
            )
        ),
    ],
    "tts": [
        Event(audio_chunk=AudioChunk(data=SOUND, content_type="audio/mpeg")),
        Event(audio_chunk=AudioChunk(data=SOUND)),
    ],
    "sts": [
        Event(audio_chunk=AudioChunk(data=SOUND, content_type="audio/mpeg")),
        Event(audio_chunk=AudioChunk(data=SOUND)),
    ],
    "stt": [Event(result=TaskResult(transcription=Transcription(text="Heard.", audio_seconds=1.5)))],
}


class Acme:
    """A plug-in's provider, whose vendor tells the cost of each request."""

    configured = True

    def __init__(self) -> None:
        self.act: Callable[[Job], AsyncIterator[Event]]
        self.text = self.image = self.text_to_speech = self.speech_to_speech = self.speech_to_text = self._act

    def _act(self, job: Job) -> Any:
        return self.act(job)

    async def aclose(self) -> None:
        """See Provider."""


@dataclass
class Rig:
    """A house; the vendor that OpenRouter and Black Forest Labs are played by; plug-ins of two routes."""

    house: RunningApp
    vendor: FaultUpstream
    first: Acme = field(default_factory=Acme)
    acme: Acme = field(default_factory=Acme)

    async def record(self, caller: Account, told: Outcome) -> UsageRecord:
        """The one record of a caller; nothing else was charged or told."""
        (record,) = await self.house.records(caller)
        assert (await self.house.balance(caller, live=True)).spent == record.cost
        if "x-credits-charged" in told.metadata:
            assert round(float(told.metadata["x-credits-charged"]) * 10**6) == record.cost
        await self.house.assert_audit_clean()
        return record


@pytest.fixture(scope="module", name="rig", params=["sqlite", "redis"])
async def _rig(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Rig]:
    """A server with the built-in adapters."""
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
    """A server whose models are answered by plug-ins. The route before Acme's is out of order."""
    folder = tmp_path_factory.mktemp("plugged")
    rows = [
        ACME.format(
            name=f"{TASK_BODIES[of]['model']}-acme", kind=kind, limits=limits, price=price, first="first"
        )
        for of, (kind, limits, price) in TYPES.items()
    ]
    (folder / "catalog.toml").write_text("".join(rows))
    first, acme = Acme(), Acme()
    async with AsyncExitStack() as stack:
        settings: dict[str, Any] = {}
        if request.param == "redis":
            settings["store"] = stack.enter_context(RedisServer()).url
        house = await stack.enter_async_context(
            run_app(
                folder,
                settings=settings,
                catalog=Catalog.load(BUILTIN, folder / "catalog.toml"),
                providers={"sandbox": Sandbox(), "first": first, "acme": acme},
            )
        )
        yield Rig(house, house.upstream, first, acme)


@pytest.fixture(autouse=True)
def _broken(request: pytest.FixtureRequest) -> None:
    if "plugged" in request.fixturenames:
        request.getfixturevalue("plugged").first.act = failing()


def answering(kind: str, *costs: Any) -> Callable[[Job], AsyncIterator[Event]]:
    """What gives a good answer, and reports a cost before each of its events."""

    async def act(job: Job) -> AsyncIterator[Event]:
        events = GOOD[kind]
        if kind == "text" and not job.stream:
            events = [Event(text_delta=TextDelta(content="one two", finish_reason=STOP, usage=COUNTS))]
        elif kind == "image" and not job.stream:
            events = events[1:]
        for cost, event in zip((*costs, *[None] * len(events)), events, strict=False):
            if cost is not None:
                job.report.cost = cost
            copied = Event()
            copied.CopyFrom(event)
            yield copied

    return act


def failing(cost: Any = None, replay: Replay = Replay.ELSEWHERE) -> Callable[[Job], AsyncIterator[Event]]:
    """What reports a cost and fails before its first event."""

    async def act(job: Job) -> AsyncIterator[Event]:
        job.report.cost = cost
        error = PomeloError("provider_unavailable", retry_after=0)
        error.replay = replay
        raise error
        yield Event()

    return act


def counts(cost: Any, **more: Any) -> dict[str, Any]:
    """Counts as OpenRouter gives them."""
    return {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500, "cost": cost, **more}


CUT = (error_event("strange"), Stop.END)
"""A failure within a stream. What comes before it is read, other than before a connection that breaks."""

BY_COUNTS = 810
"""Microcredits of these counts by the price of mixtral-8x7b at OpenRouter."""


# --- the adapters


@WAY
@HOW
@pytest.mark.parametrize(
    ("cost", "micros"), [(0.00042, 420), (0.0004201, 421), (1e-9, 1), (0.0011, 1_100), (0.0123, 12_300)]
)
async def test_a_text_of_openrouter_costs_what_it_reports(
    rig: Rig, cost: float, micros: int, way: str, stream: bool
) -> None:
    caller = await rig.house.account()
    prompt = f"<{cost}> {way} {stream}"
    rig.vendor.when(prompt, Answer("one two", usage=counts(cost)))
    told = await rig.house.ask(way, caller.live, text_body(prompt, "mixtral-8x7b"), stream=stream)
    assert told.code == "ok"
    record = await rig.record(caller, told)
    assert (record.cost, record.provider_micros) == (micros, micros)
    assert (record.input_tokens, record.output_tokens, record.source) == (1_000, 500, "provider")
    assert record.prices.endswith("provider_dollar=1000000")


@WAY
@HOW
@pytest.mark.parametrize(
    "cost",
    [None, 0, 0.0, -0.01, "0.01", True, [], {}, 10**6, 1e300],
    ids=repr,
)
@pytest.mark.parametrize("model", ["mixtral-8x7b", "mixtral-counted"])
async def test_without_a_cost_that_can_be_true_the_counts_are_billed(
    rig: Rig, model: str, cost: Any, way: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await rig.house.account()
    prompt = f"<{model} {cost!r}> {way} {stream}"
    rig.vendor.when(prompt, Answer("one two", usage=counts(cost)))
    with caplog.at_level(logging.WARNING, "pomelo"):
        told = await rig.house.ask(way, caller.live, text_body(prompt, model), stream=stream)
    assert told.code == "ok"
    record = await rig.record(caller, told)
    assert (record.cost, record.provider_micros) == (20_000 if model == "mixtral-counted" else BY_COUNTS, 0)
    expected = model == "mixtral-8x7b" and cost not in (None, 0)
    assert caplog.text.count("reported an impossible cost") == expected


async def test_a_cost_that_is_the_hosts_fee_alone_is_not_billed(rig: Rig) -> None:
    caller = await rig.house.account()
    rig.vendor.when("own key", Answer("one two", usage=counts(0.00001, is_byok=True)))
    told = await rig.house.ask("rest", caller.live, text_body("own key", "mixtral-8x7b"))
    assert (await rig.record(caller, told)).cost == BY_COUNTS


@WAY
async def test_a_stream_that_is_cut_behind_the_reported_cost_costs_that(rig: Rig, way: str) -> None:
    caller = await rig.house.account()
    prompt = f"cut {way}"
    steps = (chunk(None, usage=counts(0.0005)), *CUT)
    rig.vendor.when(prompt, Answer("one two three", at={2: steps}))
    told = await rig.house.ask(way, caller.live, text_body(prompt, "mixtral-8x7b"), stream=True)
    assert told.code == "provider_failed"
    record = await rig.record(caller, told)
    assert (record.cost, record.provider_micros, record.complete) == (500, 500, False)


@WAY
async def test_a_stream_that_is_cut_before_the_cost_comes_costs_what_was_delivered(
    rig: Rig, way: str
) -> None:
    caller = await rig.house.account()
    prompt = f"cut early {way}"
    rig.vendor.when(prompt, Answer("one two three", at={2: CUT}, usage=counts(0.0005)))
    told = await rig.house.ask(way, caller.live, text_body(prompt, "mixtral-8x7b"), stream=True)
    assert told.code == "provider_failed"
    record = await rig.record(caller, told)
    assert (record.provider_micros, record.output_tokens, record.complete) == (0, 2, False)
    assert 0 < record.cost < 500


@WAY
@HOW
@pytest.mark.parametrize(
    ("credits_told", "micros"),
    [(4.0, 50_000), (2.5, 31_250), (1, 12_500), (1.1, 13_750), (4.1, 50_000), (0, 50_000), ("2", 50_000)],
)
async def test_a_picture_of_black_forest_labs_costs_what_it_reports(
    rig: Rig, credits_told: Any, micros: int, way: str, stream: bool
) -> None:
    caller = await rig.house.account()
    body = TASK_BODIES["image"] | {"model": "flux-drawn"}
    rig.vendor.script(Drawing(order={"cost": credits_told}))
    told = await rig.house.ask(way, caller.live, body, stream=stream)
    assert told.code == "ok"
    record = await rig.record(caller, told)
    assert (record.cost, record.images) == (micros, 1)
    assert record.provider_micros in (0, micros * 4 // 5)


@WAY
@HOW
async def test_a_picture_that_is_refused_after_its_cost_was_told_costs_nothing(
    rig: Rig, way: str, stream: bool
) -> None:
    caller = await rig.house.account()
    body = TASK_BODIES["image"] | {"model": "flux-drawn"}
    rig.vendor.script(Drawing(polls=(moderated(),), done=False))
    told = await rig.house.ask(way, caller.live, body, stream=stream)
    assert told.code == "content_policy_violation"
    assert await rig.house.records(caller) == []
    assert (await rig.house.balance(caller, live=True)).spent == 0


async def test_a_picture_whose_price_is_fixed_costs_that_whatever_is_reported(rig: Rig) -> None:
    caller = await rig.house.account()
    rig.vendor.script(Drawing(order={"cost": 1.0}))
    told = await rig.house.ask("rest", caller.live, TASK_BODIES["image"])
    assert told.metadata["x-credits-charged"] == "0.04"
    record = await rig.record(caller, told)
    assert (record.cost, record.provider_micros) == (40_000, 0)


async def test_what_a_test_key_pays_is_counted(rig: Rig) -> None:
    caller = await rig.house.account()
    told = await rig.house.ask("rest", caller.test, TASK_BODIES["image"] | {"model": "flux-drawn"})
    assert told.metadata["x-credits-charged"] == "0.05"


async def test_reported_costs_and_their_price_are_shown(rig: Rig) -> None:
    house = rig.house
    caller = await house.account()
    rig.vendor.when("shown", Answer("one two", usage=counts(0.0123456)))
    await house.ask("rest", caller.live, text_body("shown", "mixtral-8x7b"))
    for way in ("rest", "remote"):
        headers = {"Authorization": f"Bearer {caller.live}"}
        async with house.session.get(f"{house.urls[way]}/api/v1/usage", headers=headers) as answer:
            (row,) = (await answer.json())["data"]
            assert (row["provider_cost"], row["cost"]) == (0.012346, 0.012346)
        async with house.session.get(f"{house.urls[way]}/api/v1/models", headers=headers) as answer:
            (model,) = [m for m in (await answer.json())["data"] if m["id"] == "flux-drawn"]
            assert model["price"] == {"image": "0.05", "provider_dollar": "1.25"}
    metadata = [("authorization", f"Bearer {caller.live}")]
    usage = await AccountServiceStub(house.channel).ListUsage(ListUsageRequest(), metadata=metadata)
    assert usage.records[0].provider_cost_micros == 12_346
    models = await ModelServiceStub(house.channel).ListModels(ListModelsRequest(), metadata=metadata)
    (draw,) = [model for model in models.models if model.name == "flux-drawn"]
    prices = {price.unit: price.amount_micros for price in draw.prices}
    assert prices[PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR] == 1_250_000


# --- plug-ins


def task(kind: str) -> dict[str, Any]:
    """A task of the plug-in's model."""
    return TASK_BODIES[kind] | {"model": f"{TASK_BODIES[kind]['model']}-acme"}


@WAY
@HOW
@pytest.mark.parametrize("kind", TYPES)
async def test_a_plug_in_of_any_task_type_reports_what_its_vendor_tells(
    plugged: Rig, kind: str, way: str, stream: bool
) -> None:
    caller = await plugged.house.account()
    plugged.acme.act = answering(kind, 0.0005, 0.0002) if stream else answering(kind, 0.0002, 0.0002)
    told = await plugged.house.ask(way, caller.live, task(kind), stream=stream)
    assert told.code == "ok"
    record = await plugged.record(caller, told)
    cost = 500 if stream and kind == "stt" else 200  # its only event
    assert (record.provider, record.provider_micros, record.cost) == ("acme", cost, cost * 11 // 10)


@pytest.mark.parametrize("way", ["rest", "remote"])
@pytest.mark.parametrize(("kind", "accept"), [("image", "image/*"), ("tts", "audio/*")])
async def test_bare_media_are_never_told_another_cost_than_is_charged(
    plugged: Rig, kind: str, accept: str, way: str
) -> None:
    caller = await plugged.house.account()
    plugged.acme.act = answering(kind, 0.0002)
    told = await plugged.house.ask(way, caller.live, task(kind), accept=accept)
    assert told.status == 200
    assert (await plugged.record(caller, told)).cost == 220


@WAY
@HOW
@pytest.mark.parametrize(
    "cost", [-1, nan, "1", 10**9, object()], ids=["-1", "nan", "text", "10**9", "object"]
)
async def test_what_a_plug_in_may_not_report_is_counted_and_logged_without_its_text(
    plugged: Rig, cost: Any, way: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await plugged.house.account()
    plugged.acme.act = answering("image", cost, cost)
    with caplog.at_level(logging.WARNING, "pomelo"):
        told = await plugged.house.ask(
            way, caller.live, task("image"), stream=stream, headers={"X-Request-Id": f"id-{way}"}
        )
    assert told.code == "ok"
    record = await plugged.record(caller, told)
    assert (record.cost, record.provider_micros) == (40_000, 0)
    (line,) = [message for message in caplog.messages if "impossible cost" in message]
    assert line.startswith(f"request id-{way}: the provider acme reported an impossible cost")


@WAY
@HOW
async def test_the_cost_of_a_failed_attempt_is_not_billed(plugged: Rig, way: str, stream: bool) -> None:
    caller = await plugged.house.account()
    plugged.first.act = failing(0.03)
    tries = [failing(0.02, Replay.AGAIN), answering("image")]
    plugged.acme.act = lambda job: tries.pop(0)(job)
    told = await plugged.house.ask(way, caller.live, task("image"), stream=stream)
    assert told.code == "ok"
    assert not tries
    record = await plugged.record(caller, told)
    assert (record.provider, record.cost, record.provider_micros) == ("acme", 40_000, 0)


@WAY
@HOW
async def test_the_cost_of_the_attempt_that_answers_is_billed(plugged: Rig, way: str, stream: bool) -> None:
    caller = await plugged.house.account()
    plugged.first.act = failing(0.03)
    tries = [failing(0.02, Replay.AGAIN), answering("image", 0.01)]
    plugged.acme.act = lambda job: tries.pop(0)(job)
    told = await plugged.house.ask(way, caller.live, task("image"), stream=stream)
    assert (await plugged.record(caller, told)).cost == 11_000


@HOW
async def test_a_task_that_fails_after_a_report_costs_nothing(plugged: Rig, stream: bool) -> None:
    caller = await plugged.house.account()
    plugged.acme.act = failing(0.01, Replay.NEVER)
    told = await plugged.house.ask("rest", caller.live, task("image"), stream=stream)
    assert told.code == "provider_unavailable"
    assert await plugged.house.records(caller) == []


@WAY
async def test_a_stream_that_is_left_costs_what_was_reported_by_then(plugged: Rig, way: str) -> None:
    caller = await plugged.house.account()
    gate = Gate()

    async def act(job: Job) -> AsyncIterator[Event]:
        job.report.cost = 0.0007
        yield Event(text_delta=TextDelta(content="one "))
        await gate.pass_through()

    plugged.acme.act = act
    client = LeavingClient(plugged.house, way, caller.live, task("text"), stream=True)
    await client.has(1)
    store = plugged.house.server.store
    for _ in range(100):  # what a crash would cost is noted every second
        noted = [record.cost for record in await store.held() if record.account == caller.name]
        if noted == [770]:
            break
        await asyncio.sleep(0.05)
    assert noted == [770]
    await client.leave()
    await plugged.house.idle(caller, live=True)
    record = await plugged.record(caller, Outcome())
    assert (record.cost, record.provider_micros, record.complete) == (770, 700, False)


async def test_twenty_at_once_on_the_balance_of_one_leave_nothing_uncollected(plugged: Rig) -> None:
    caller = await plugged.house.account(live=40_000)
    plugged.acme.act = answering("image", 0.0363636363, 0.0363636363)  # with its markup all that is held
    asked = [plugged.house.ask(way, caller.live, task("image")) for way in PROTOCOLS * 7]
    codes = [told.code for told in await asyncio.gather(*asked)]
    assert set(codes) == {"ok", "insufficient_credits"}
    records = await plugged.house.records(caller)
    assert [record.uncollected for record in records] == [0] * codes.count("ok")
