"""Adjusted parameters are reported in headers and messages, or refused with `Prefer: handling=strict`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from pomelo.testing import Answer, FaultUpstream, Received, Reply
from pomelo.testing.openai_protocol import error_reply
from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOL, PROTOCOLS, STREAM, Outcome
from tests.tasks import TASK_BODIES, text_body

STRICT = {"Prefer": "handling=strict"}

HAIKU = "claude-3-haiku"
TTS, STS, STT = TASK_BODIES["tts"], TASK_BODIES["sts"], TASK_BODIES["stt"]
IMAGE = {"model": "flux-1-pro", "prompt": "A kite"}

ADJUSTED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (text_body(stop=["END"]), "stop", {"stop": None}),
    (text_body(stop="END", presence_penalty=0.5, top_p=0.5), "stop; presence_penalty", {"top_p": 0.5}),
    (text_body(max_tokens=200_000), "max_tokens=128000", {"max_completion_tokens": 128_000}),
    (text_body(model=HAIKU, temperature=1.5, seed=1), "seed; temperature=1", {"temperature": 1}),
    (text_body(model=HAIKU, temperature=0.5, top_p=0.5), "top_p", {"temperature": 0.5, "top_p": None}),
    (text_body(model=HAIKU, stop=["\n", "END"]), "stop[0]", {"stop_sequences": ["END"]}),
    (text_body(model=HAIKU, stop=["\n", " "]), "stop", {"stop_sequences": None}),
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
"""A task, the header of its answer, and the fields that the vendor gets."""

UNADJUSTED: list[dict[str, Any]] = [
    text_body(temperature=1.5, top_p=0.5, seed=7, user="me", max_tokens=100),
    text_body(model=HAIKU, temperature=1, stop=["END"]),
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


@dataclass
class Rig:
    """A server, a separate fake vendor for Anthropic and Replicate, and a caller with one protocol."""

    app: RunningApp
    other: FaultUpstream
    protocol: str
    caller: Account

    async def ask(self, body: dict[str, Any], **options: Any) -> Outcome:
        """Runs a task with the caller's live key."""
        return await self.app.ask(self.protocol, self.caller.live, body, **options)

    @property
    def requests(self) -> list[Received]:
        """The requests to the vendors."""
        return [*self.app.upstream.requests, *self.other.requests]


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[RunningApp, FaultUpstream]]:
    """The server and the separate vendor."""
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
        async with run_app(folder, settings=settings) as app:
            yield app, other


@pytest.fixture(params=PROTOCOLS)
async def rig(request: pytest.FixtureRequest, shared: tuple[RunningApp, FaultUpstream]) -> Rig:
    """The server with a new account, and vendors that have received nothing."""
    app, other = shared
    app.upstream.reset()
    other.reset()
    return Rig(app, other, request.param, await app.account())


@pytest.fixture
def first_fails(rig: Rig) -> Iterator[None]:
    """Makes the first route of the model two-routes fail."""

    def script(received: Received) -> Reply:
        if received.body["model"] == "first":
            return error_reply(503, "overloaded")
        return Answer("second")(received)

    rig.app.upstream.default = script
    yield
    rig.app.upstream.default = None


def adjusted(response: Outcome) -> str | None:
    """Returns the header X-Pomelo-Adjusted, to which the adjustments of a gRPC message are equal."""
    header = response.headers.get("x-pomelo-adjusted")
    if response.trailers:
        assert "; ".join(response.adjustments) == (header or "")
    return header


# --- reported


@STREAM
@pytest.mark.parametrize(("body", "header", "sent"), ADJUSTED, ids=[header for _, header, _ in ADJUSTED])
async def test_adjusted_parameters_are_reported(
    rig: Rig, stream: bool, body: dict[str, Any], header: str, sent: dict[str, Any]
) -> None:
    response = await rig.ask(body, stream=stream)
    assert (response.code, adjusted(response)) == ("ok", header)
    assert "preference-applied" not in response.headers
    vendor_request = next(request for request in rig.requests if request.method == "POST")
    fields = vendor_request.body or {part.name: part.text for part in vendor_request.form or ()}
    for name, value in sent.items():
        assert fields.get(name) == value


async def test_a_long_conversation_is_adjusted(rig: Rig) -> None:
    body = text_body("word " * 60_000, stop=["END"])
    response = await rig.ask(body)
    assert (response.code, adjusted(response)) == ("ok", "stop")
    assert "stop" not in rig.requests[0].body
    assert rig.requests[0].body["messages"] == body["messages"]
    refused = await rig.ask(body, headers=STRICT)
    assert (refused.code, len(rig.requests)) == ("invalid_parameter", 1)


@STREAM
@pytest.mark.parametrize(("body", "header"), [(body, header) for body, header, _ in ADJUSTED[::2]])
async def test_a_test_key_gets_the_report_of_a_live_key(
    rig: Rig, stream: bool, body: dict[str, Any], header: str
) -> None:
    response = await rig.app.ask(rig.protocol, rig.caller.test, body, stream=stream)
    assert (response.code, adjusted(response), rig.requests) == ("ok", header, [])
    refused = await rig.app.ask(rig.protocol, rig.caller.test, body, stream=stream, headers=STRICT)
    assert (refused.code, adjusted(refused)) == ("invalid_parameter", None)


@pytest.mark.parametrize("body", [*UNADJUSTED, *TASK_BODIES.values()], ids=lambda body: str(body["model"]))
@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
async def test_parameters_that_the_model_takes_are_not_reported(
    rig: Rig, body: dict[str, Any], strict: bool
) -> None:
    if body is TASK_BODIES["image"]:
        body = body | {"width": 256, "height": 256}
    response = await rig.ask(body, headers=STRICT if strict else {})
    assert (response.code, adjusted(response), response.adjustments) == ("ok", None, ())
    assert response.headers.get("preference-applied") == ("handling=strict" if strict else None)


async def test_limiting_the_output_to_the_balance_is_not_an_adjustment(rig: Rig) -> None:
    rig.caller = await rig.app.account(live=50_000)
    response = await rig.ask(text_body("Hi"), headers=STRICT)
    assert (response.code, adjusted(response)) == ("ok", None)
    assert 0 < rig.requests[0].body["max_completion_tokens"] < 128_000


@STREAM
async def test_an_image_of_an_adjusted_size_is_billed_by_that_size(rig: Rig, stream: bool) -> None:
    body = {"model": "flux-megapixels", "prompt": "A kite", "width": 1920, "height": 1080}
    response = await rig.ask(body, stream=stream)
    assert (response.code, adjusted(response)) == ("ok", "width=1344; height=768")
    vendor_request = rig.requests[0].body["input"]
    assert (vendor_request["aspect_ratio"], vendor_request["megapixels"]) == ("16:9", "1")
    (record,) = await rig.app.records(rig.caller)
    assert record.cost == ceil(1344 * 768 * 3_000 / 1_000_000)
    response = await rig.ask(body | {"width": 512, "height": 512}, headers=STRICT)
    assert (response.code, adjusted(response)) == ("ok", None)


async def test_fields_fixed_by_the_operator_are_reported(rig: Rig) -> None:
    body = text_body(model="fixed", temperature=0.9, seed=5, stop=["END"])
    response = await rig.ask(body)
    assert (response.code, adjusted(response)) == ("ok", "stop; seed; temperature=0.6")
    assert rig.requests[0].body["temperature"] == 0.6
    body = text_body(model="fixed", temperature=0.6)
    response = await rig.ask(body, headers=STRICT)
    assert (response.code, adjusted(response)) == ("ok", None)


# --- strict


@STREAM
@pytest.mark.parametrize(("body", "header"), [(body, header) for body, header, _ in ADJUSTED])
async def test_strict_handling_refuses_before_limits_and_credits(
    rig: Rig, stream: bool, body: dict[str, Any], header: str
) -> None:
    rig.caller = await rig.app.account("five")
    response = await rig.ask(body, stream=stream, headers=STRICT)
    first = header.split("; ")[0].split("=")[0]
    assert response.code == "invalid_parameter"
    assert response.message.startswith(f"Invalid {first}: must be ")
    assert response.status == (200 if rig.protocol == "grpc" else 400)
    assert response.headers["preference-applied"] == "handling=strict"
    assert response.headers["x-ratelimit-remaining"] == "5"
    assert "x-pomelo-adjusted" not in response.headers
    assert rig.requests == []
    assert await rig.app.records(rig.caller) == []
    balance = await rig.app.balance(rig.caller, live=True)
    assert (balance.spent, balance.held) == (0, 0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (text_body(stop=["END"]), "Invalid stop: must be left out: the model does not take it"),
        (text_body(model=HAIKU, temperature=2), "Invalid temperature: must be a number from 0 to 1"),
        ({**IMAGE, "width": 1000}, "Invalid width: must be a multiple of 32 from 256 to 1,440"),
        (text_body(max_tokens=200_000), "Invalid max_tokens: must be a whole number from 1 to 128,000"),
    ],
)
async def test_an_error_has_the_range_that_the_model_accepts(
    rig: Rig, body: dict[str, Any], expected: str
) -> None:
    assert (await rig.ask(body, headers=STRICT)).message == expected


@pytest.mark.parametrize("prefer", ["handling=lenient", "respond-async", "handling=maybe", "strict"])
async def test_other_preferences_are_ignored(rig: Rig, prefer: str) -> None:
    response = await rig.ask(text_body(stop=["END"]), headers={"Prefer": prefer})
    assert (response.code, adjusted(response)) == ("ok", "stop")
    assert "preference-applied" not in response.headers


@PROTOCOL
async def test_a_strict_task_is_refused_before_a_missing_provider_is_reported(
    tmp_path: Path, protocol: str
) -> None:
    async with run_app(tmp_path) as app:
        caller = await app.account()
        body = text_body(model=HAIKU, seed=1)
        response = await app.ask(protocol, caller.live, body, headers=STRICT)
        assert response.message == "Invalid seed: must be left out: the model does not take it"
        assert (await app.ask(protocol, caller.live, body)).code == "provider_not_configured"


# --- several routes


@STREAM
@pytest.mark.usefixtures("first_fails")
async def test_the_adjustments_are_those_of_the_route_that_answers(rig: Rig, stream: bool) -> None:
    body = text_body(model="two-routes", seed=1, stop=["END"], temperature=1.5)
    response = await rig.ask(body, stream=stream)
    assert (response.code, adjusted(response)) == ("ok", "stop; temperature=1")
    first, *_, last = [
        [request.body.get(name) for name in ("seed", "stop", "temperature")] for request in rig.requests
    ]
    assert (first, last) == ([None, ["END"], 1.5], [1, None, 1])


@pytest.mark.usefixtures("first_fails")
async def test_a_strict_task_skips_routes_that_would_adjust_it(rig: Rig) -> None:
    body = text_body(model="two-routes", stop=["END"])
    response = await rig.ask(body, headers=STRICT)
    assert response.code == "provider_unavailable"
    assert {request.body["model"] for request in rig.requests} == {"first"}
    response = await rig.ask(text_body(model="two-routes"), headers=STRICT)
    assert (response.code, rig.requests[-1].body["model"]) == ("ok", "second")


@STREAM
@pytest.mark.usefixtures("first_fails")
async def test_a_strict_replay_of_an_adjusted_answer_is_refused(rig: Rig, stream: bool) -> None:
    key = {"Idempotency-Key": f"strict-repeat-{rig.protocol}-{stream}"}
    body = text_body(model="two-routes", stop=["END"])
    response = await rig.ask(body, headers=key, stream=stream)
    assert adjusted(response) == "stop"
    replayed = await rig.ask(body, headers=key, stream=stream)
    assert (replayed.code, adjusted(replayed)) == ("ok", "stop")
    assert replayed.metadata["idempotent-replayed"] == "true"
    strict = await rig.ask(body, headers=key | STRICT, stream=stream)
    assert (strict.code, "stop" in strict.message) == ("invalid_parameter", True)
    assert len(await rig.app.records(rig.caller)) == 1


# --- replays


@STREAM
async def test_a_replayed_answer_has_the_same_adjustments(rig: Rig, stream: bool) -> None:
    headers = {"Idempotency-Key": f"adjusted-{rig.protocol}-{stream}"}
    body = text_body(stop=["END"])
    response = await rig.ask(body, stream=stream, headers=headers)
    assert adjusted(response) == "stop"
    for protocol in PROTOCOLS:
        for replay_stream in (False, True):
            replayed = await replace(rig, protocol=protocol).ask(body, stream=replay_stream, headers=headers)
            assert (replayed.code, replayed.id, adjusted(replayed)) == ("ok", response.id, "stop")
            assert replayed.adjustments == (("stop",) if protocol == "grpc" else ())
    assert len(rig.requests) == 1
    refused = await rig.ask(body, headers=headers | STRICT)
    assert refused.code == "invalid_parameter"


async def test_the_preference_is_not_part_of_the_request_identity(rig: Rig) -> None:
    headers = {"Idempotency-Key": f"handled-{rig.protocol}"}
    response = await rig.ask(text_body(), headers=headers | STRICT)
    replayed = await rig.ask(text_body(), headers=headers)
    assert (response.code, replayed.code, replayed.id) == ("ok", "ok", response.id)
    assert "preference-applied" not in replayed.headers
