"""Parameters that a model can't take: reported in headers and messages, or refused with `Prefer: handling=strict`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from pomelo.testing import Answer, FaultUpstream, Received, Reply
from pomelo.testing.openai_wire import error_reply
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS, Outcome
from tests.tasks import TASK_BODIES, text_body

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
STRICT = {"Prefer": "handling=strict"}

TTS, STS, STT = TASK_BODIES["tts"], TASK_BODIES["sts"], TASK_BODIES["stt"]
IMAGE = {"model": "flux-1-pro", "prompt": "A kite"}

ADJUSTED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (text_body(stop=["END"]), "stop", {"stop": None}),
    (text_body(stop="END", presence_penalty=0.5, top_p=0.5), "stop; presence_penalty", {"top_p": 0.5}),
    (text_body(max_tokens=200_000), "max_tokens=128000", {"max_completion_tokens": 128_000}),
    (text_body(model="claude-3-haiku", temperature=1.5, seed=1), "seed; temperature=1", {"temperature": 1}),
    (
        text_body(model="claude-3-haiku", temperature=0.5, top_p=0.5),
        "top_p",
        {"temperature": 0.5, "top_p": None},
    ),
    (text_body(model="claude-3-haiku", stop=["\n", "END"]), "stop[0]", {"stop_sequences": ["END"]}),
    (text_body(model="claude-3-haiku", stop=["\n", " "]), "stop", {"stop_sequences": None}),
    (
        text_body(model="mixtral-8x7b", user="me", temperature=2),
        "user; temperature=1.5",
        {"temperature": 1.5},
    ),
    (text_body(model="mixtral-8x7b", top_p=0), "top_p=1e-06", {"top_p": 1e-6}),
    ({**IMAGE, "width": 1000, "height": 960}, "width=992", {"width": 992, "height": 960}),
    ({**IMAGE, "width": 64, "height": 2048}, "width=256; height=1440", {"width": 256, "height": 1440}),
    (
        {**IMAGE, "num_inference_steps": 20, "guidance_scale": 3},
        "num_inference_steps; guidance_scale",
        {"steps": None, "guidance": None},
    ),
    ({**IMAGE, "model": "flux-1-dev", "guidance_scale": 20}, "guidance_scale=5", {"guidance": 5}),
    (
        {**IMAGE, "model": "flux-1-schnell", "num_inference_steps": 9, "output_format": "webp"},
        "num_inference_steps=4; output_format=png",
        {"steps": 4, "output_format": "png"},
    ),
    (
        {**TTS, "voice_settings": {"speed": 4, "stability": 0.5}, "language_code": "en"},
        "language_code; voice_settings.speed=1.2",
        {"voice_settings": {"stability": 0.5, "speed": 1.2}},
    ),
    (
        {**STS, "voice_settings": {"speed": 0.25}},
        "voice_settings.speed=0.7",
        {"voice_settings": '{"speed":0.7}'},
    ),
    ({**STT, "num_speakers": 3}, "num_speakers", {"num_speakers": None}),
]
"""A task, the header of its answer, and what the vendor gets."""

UNADJUSTED: list[dict[str, Any]] = [
    text_body(temperature=1.5, top_p=0.5, seed=7, user="me", max_tokens=100),
    text_body(model="claude-3-haiku", temperature=1, stop=["END"]),
    {**IMAGE, "width": 1024, "height": 768, "seed": 3, "output_format": "webp"},
    {**TTS, "voice_settings": {"speed": 1.1}, "output_format": "pcm_16000", "seed": 3},
    {**STT, "diarize": True, "num_speakers": 3, "language_code": "en", "timestamps": "character"},
]

CATALOG = """
[models.two-routes]
type = "text"
limits = { max_input_tokens = 100_000, max_output_tokens = 4_000 }
price = { million_input_tokens = "1", million_output_tokens = "2" }
price_version = "2026-11-24"
[[models.two-routes.routes]]
provider = "openai"
model = "first"
drop = ["seed"]
[[models.two-routes.routes]]
provider = "second"
model = "second"
drop = ["stop"]
clamp = { temperature = [0, 1] }

[models.fixed]
type = "text"
limits = { max_input_tokens = 100_000, max_output_tokens = 4_000 }
price = { million_input_tokens = "1", million_output_tokens = "2" }
price_version = "2026-11-24"
[[models.fixed.routes]]
provider = "openai"
model = "fixed"
seed_field = "none"
extra = { temperature = 0.6, stop = ["X"] }

[models.flux-megapixels]
type = "image"
limits = { max_characters = 10_000 }
price = { megapixel = "0.003" }
price_version = "2026-11-22"
[[models.flux-megapixels.routes]]
provider = "replicate"
model = "black-forest-labs/flux-schnell"

[hosts.second]
credentials = "openai"
"""


@dataclass(frozen=True)
class Rig:
    """A house, and a played vendor of its own for Anthropic and Replicate."""

    house: RunningApp
    other: FaultUpstream

    def reset(self) -> None:
        """Forgets what was asked of the vendors."""
        self.house.upstream.reset()
        self.other.reset()

    @property
    def requests(self) -> list[Received]:
        """What the vendors were asked."""
        return [*self.house.upstream.requests, *self.other.requests]


@pytest.fixture(scope="module", name="shared")
async def _shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    folder = tmp_path_factory.mktemp("adjustments")
    (folder / "catalog.toml").write_text(CATALOG)
    async with FaultUpstream() as other:
        settings = {
            "catalog": folder / "catalog.toml",
            "anthropic_api_key": "a-x",
            "anthropic_base_url": other.anthropic_base_url,
            "replicate_api_key": "r-x",
            "replicate_base_url": other.replicate_base_url,
        }
        async with run_app(folder, settings=settings) as house:
            yield Rig(house, other)


@pytest.fixture(name="rig")
def _rig(shared: Rig) -> Rig:
    shared.reset()
    return shared


def adjusted(told: Outcome) -> str | None:
    """The header."""
    return told.headers.get("x-pomelo-adjusted")


# --- reported


@WAY
@HOW
@pytest.mark.parametrize(("body", "header", "sent"), ADJUSTED, ids=[header for _, header, _ in ADJUSTED])
async def test_what_the_vendor_gets_otherwise_is_reported(
    rig: Rig, way: str, stream: bool, body: dict[str, Any], header: str, sent: dict[str, Any]
) -> None:
    caller = await rig.house.account()
    told = await rig.house.ask(way, caller.live, body, stream=stream)
    assert (told.code, adjusted(told)) == ("ok", header)
    assert "preference-applied" not in told.headers
    if way == "grpc":
        assert "; ".join(told.adjustments) == header
    order = next(request for request in rig.requests if request.method == "POST")
    fields = order.body or {part.name: part.text for part in order.form or ()}
    for name, value in sent.items():
        assert fields.get(name) == value


@WAY
async def test_a_long_conversation_is_adjusted_too(rig: Rig, way: str) -> None:
    caller = await rig.house.account()
    body = text_body("word " * 60_000, stop=["END"])
    told = await rig.house.ask(way, caller.live, body)
    assert (told.code, adjusted(told)) == ("ok", "stop")
    assert "stop" not in rig.requests[0].body
    assert rig.requests[0].body["messages"] == body["messages"]
    refused = await rig.house.ask(way, caller.live, body, headers=STRICT)
    assert (refused.code, len(rig.requests)) == ("invalid_parameter", 1)


@WAY
@HOW
@pytest.mark.parametrize(("body", "header"), [(body, header) for body, header, _ in ADJUSTED[::2]])
async def test_a_test_key_gets_the_report_of_a_live_key(
    rig: Rig, way: str, stream: bool, body: dict[str, Any], header: str
) -> None:
    caller = await rig.house.account()
    told = await rig.house.ask(way, caller.test, body, stream=stream)
    assert (told.code, adjusted(told), rig.requests) == ("ok", header, [])
    if way == "grpc":
        assert "; ".join(told.adjustments) == header
    refused = await rig.house.ask(way, caller.test, body, stream=stream, headers=STRICT)
    assert (refused.code, adjusted(refused)) == ("invalid_parameter", None)


@WAY
@pytest.mark.parametrize("body", [*UNADJUSTED, *TASK_BODIES.values()], ids=lambda body: str(body["model"]))
@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
async def test_what_the_model_takes_is_not_reported(
    rig: Rig, way: str, body: dict[str, Any], strict: bool
) -> None:
    caller = await rig.house.account()
    if body is TASK_BODIES["image"]:
        body = body | {"width": 256, "height": 256}
    told = await rig.house.ask(way, caller.live, body, headers=STRICT if strict else {})
    assert (told.code, adjusted(told), told.adjustments) == ("ok", None, ())
    assert told.headers.get("preference-applied") == ("handling=strict" if strict else None)


@WAY
async def test_an_output_that_is_cut_to_the_balance_is_no_adjustment(rig: Rig, way: str) -> None:
    caller = await rig.house.account(live=50_000)
    told = await rig.house.ask(way, caller.live, text_body("Hi"), headers=STRICT)
    assert (told.code, adjusted(told)) == ("ok", None)
    assert 0 < rig.requests[0].body["max_completion_tokens"] < 128_000


@WAY
@HOW
async def test_a_picture_in_another_size_costs_what_was_made(rig: Rig, way: str, stream: bool) -> None:
    caller = await rig.house.account()
    body = {"model": "flux-megapixels", "prompt": "A kite", "width": 1920, "height": 1080}
    told = await rig.house.ask(way, caller.live, body, stream=stream)
    assert (told.code, adjusted(told)) == ("ok", "width=1344; height=768")
    order = rig.requests[0].body["input"]
    assert (order["aspect_ratio"], order["megapixels"]) == ("16:9", "1")
    (record,) = await rig.house.records(caller)
    assert record.cost == ceil(1344 * 768 * 3_000 / 1_000_000)
    told = await rig.house.ask(way, caller.live, body | {"width": 512, "height": 512}, headers=STRICT)
    assert (told.code, adjusted(told)) == ("ok", None)


@WAY
async def test_fields_that_the_operator_has_fixed_are_reported(rig: Rig, way: str) -> None:
    caller = await rig.house.account()
    body = text_body(model="fixed", temperature=0.9, seed=5, stop=["END"])
    told = await rig.house.ask(way, caller.live, body)
    assert (told.code, adjusted(told)) == ("ok", "stop; seed; temperature=0.6")
    assert rig.requests[0].body["temperature"] == 0.6
    told = await rig.house.ask(way, caller.live, text_body(model="fixed", temperature=0.6), headers=STRICT)
    assert (told.code, adjusted(told)) == ("ok", None)


# --- strict


@WAY
@HOW
@pytest.mark.parametrize(("body", "header"), [(body, header) for body, header, _ in ADJUSTED])
async def test_strict_handling_refuses_before_anything_is_taken(
    rig: Rig, way: str, stream: bool, body: dict[str, Any], header: str
) -> None:
    caller = await rig.house.account("five")
    told = await rig.house.ask(way, caller.live, body, stream=stream, headers=STRICT)
    first = header.split("; ")[0].split("=")[0]
    assert told.code == "invalid_parameter"
    assert told.message.startswith(f"Invalid {first}: must be ")
    assert told.status == (200 if way == "grpc" else 400)
    assert told.headers["preference-applied"] == "handling=strict"
    assert told.headers["x-ratelimit-remaining"] == "5"
    assert "x-pomelo-adjusted" not in told.headers
    assert rig.requests == []
    assert await rig.house.records(caller) == []
    balance = await rig.house.balance(caller, live=True)
    assert (balance.spent, balance.held) == (0, 0)


@WAY
@pytest.mark.parametrize(
    ("body", "takes"),
    [
        (text_body(stop=["END"]), "Invalid stop: must be left out: the model does not take it"),
        (
            text_body(model="claude-3-haiku", temperature=2),
            "Invalid temperature: must be a number from 0 to 1",
        ),
        ({**IMAGE, "width": 1000}, "Invalid width: must be a multiple of 32 from 256 to 1440"),
        (text_body(max_tokens=200_000), "Invalid max_tokens: must be a whole number from 1 to 128000"),
    ],
)
async def test_a_refusal_says_what_the_model_takes(
    rig: Rig, way: str, body: dict[str, Any], takes: str
) -> None:
    caller = await rig.house.account()
    assert (await rig.house.ask(way, caller.live, body, headers=STRICT)).message == takes


@WAY
@pytest.mark.parametrize("prefer", ["handling=lenient", "respond-async", "handling=maybe", "strict"])
async def test_other_preferences_change_nothing(rig: Rig, way: str, prefer: str) -> None:
    caller = await rig.house.account()
    told = await rig.house.ask(way, caller.live, text_body(stop=["END"]), headers={"Prefer": prefer})
    assert (told.code, adjusted(told)) == ("ok", "stop")
    assert "preference-applied" not in told.headers


@WAY
async def test_a_strict_task_is_refused_before_a_missing_provider_is_told(tmp_path: Path, way: str) -> None:
    async with run_app(tmp_path) as house:
        caller = await house.account()
        body = text_body(model="claude-3-haiku", seed=1)
        told = await house.ask(way, caller.live, body, headers=STRICT)
        assert told.message == "Invalid seed: must be left out: the model does not take it"
        assert (await house.ask(way, caller.live, body)).code == "provider_not_configured"


# --- another route


@WAY
@HOW
async def test_the_route_that_answers_is_reported_in_the_messages(rig: Rig, way: str, stream: bool) -> None:
    caller = await rig.house.account()
    rig.house.upstream.default = _first_fails
    try:
        body = text_body(model="two-routes", seed=1, stop=["END"], temperature=1.5)
        told = await rig.house.ask(way, caller.live, body, stream=stream)
    finally:
        rig.house.upstream.default = None
    answered = "stop; temperature=1"
    assert told.code == "ok"
    assert adjusted(told) == answered
    if way == "grpc":
        assert "; ".join(told.adjustments) == answered
    first, *_, last = rig.requests
    assert (first.body.get("seed"), first.body.get("stop"), first.body.get("temperature")) == (
        None,
        ["END"],
        1.5,
    )
    assert (last.body.get("seed"), last.body.get("stop"), last.body.get("temperature")) == (1, None, 1)


@WAY
async def test_a_strict_task_skips_routes_that_would_adjust_it(rig: Rig, way: str) -> None:
    caller = await rig.house.account()
    rig.house.upstream.default = _first_fails
    try:
        body = text_body(model="two-routes", stop=["END"])
        told = await rig.house.ask(way, caller.live, body, headers=STRICT)
        assert told.code == "provider_unavailable"
        assert {request.body["model"] for request in rig.requests} == {"first"}
        told = await rig.house.ask(way, caller.live, text_body(model="two-routes"), headers=STRICT)
        assert (told.code, rig.requests[-1].body["model"]) == ("ok", "second")
    finally:
        rig.house.upstream.default = None


@WAY
@HOW
async def test_a_strict_repeat_of_an_answer_that_was_adjusted_is_refused(
    rig: Rig, way: str, stream: bool
) -> None:
    caller = await rig.house.account()
    key = {"Idempotency-Key": f"strict-repeat-{way}-{stream}"}
    body = text_body(model="two-routes", stop=["END"])
    rig.house.upstream.default = _first_fails
    try:
        told = await rig.house.ask(way, caller.live, body, headers=key, stream=stream)
    finally:
        rig.house.upstream.default = None
    assert adjusted(told) == "stop"
    again = await rig.house.ask(way, caller.live, body, headers=key, stream=stream)
    assert (again.code, adjusted(again), again.metadata["idempotent-replayed"]) == ("ok", "stop", "true")
    strict = await rig.house.ask(way, caller.live, body, headers=key | STRICT, stream=stream)
    assert (strict.code, "stop" in strict.message) == ("invalid_parameter", True)
    assert len(await rig.house.records(caller)) == 1


# --- again


@pytest.mark.parametrize("first", PROTOCOLS)
@HOW
async def test_a_repeated_answer_has_the_same_report(rig: Rig, first: str, stream: bool) -> None:
    caller = await rig.house.account()
    headers = {"Idempotency-Key": f"adjusted-{first}-{stream}"}
    body = text_body(stop=["END"])
    told = await rig.house.ask(first, caller.live, body, stream=stream, headers=headers)
    assert adjusted(told) == "stop"
    for way in PROTOCOLS:
        for how in (False, True):
            again = await rig.house.ask(way, caller.live, body, stream=how, headers=headers)
            assert (again.code, again.id, adjusted(again)) == ("ok", told.id, "stop")
            assert again.adjustments == (("stop",) if way == "grpc" else ())
    assert len(rig.requests) == 1
    refused = await rig.house.ask(first, caller.live, body, headers=headers | STRICT)
    assert refused.code == "invalid_parameter"


@WAY
async def test_how_a_request_is_handled_is_no_part_of_it(rig: Rig, way: str) -> None:
    caller = await rig.house.account()
    headers = {"Idempotency-Key": f"handled-{way}"}
    told = await rig.house.ask(way, caller.live, text_body(), headers=headers | STRICT)
    again = await rig.house.ask(way, caller.live, text_body(), headers=headers)
    assert (told.code, again.code, again.id) == ("ok", "ok", told.id)
    assert "preference-applied" not in again.headers


def _first_fails(received: Received) -> Reply:
    if received.body["model"] == "first":
        return error_reply(503, "overloaded")
    return Answer("second")(received)
