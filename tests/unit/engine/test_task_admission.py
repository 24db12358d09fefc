"""Which tasks are admitted, on which routes, and how much of the balance each reserves."""

from __future__ import annotations

import io
import math
import wave
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomelo.catalog.pricing import cost_at
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.providers.base import CALLER, Event, Job
from pomelo.providers.errors import UpstreamError
from pomelo.testing import Answer as Words
from pomelo.testing import Gate, mistral_protocol
from tests.calls import call_of
from tests.tasks import TASK_TYPES, small_task, text_body, to_task
from tests.unit.engine.apps import PROTOCOL, STREAM, EngineApp, open_engine
from tests.unit.tasks.collectors import MODELS, estimate_of

IMAGE = {"model": "flux-1-pro", "prompt": "A kite"}
LIMIT = 4 * 1024 * 1024
"""Bytes of media that an account may store."""

STRICT = {"prefer": "handling=strict"}
REVOKED = mistral_protocol.error_reply(401)
"""A reply that makes the router use the second route of a Mixtral model."""


@pytest.fixture(scope="module", name="opened_engine")
async def _opened_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineApp]:
    async with open_engine(tmp_path_factory.mktemp("admitted"), media_account_limit=LIMIT) as opened:
        yield opened


async def test_a_model_must_be_allowed_by_the_key_and_by_the_plan(engine: EngineApp) -> None:
    by_plan = await engine.account("images")
    by_key = await engine.account(models=("gpt-4",))
    by_neither = await engine.account("images", models=("gpt-4",))
    for account, allowed in ((by_plan, IMAGE), (by_key, text_body()), (by_neither, None)):
        for body in (IMAGE, text_body()):
            answer = await engine.ask(account, body)
            assert answer.code == ("ok" if body == allowed else "model_not_allowed")


async def test_a_test_key_uses_test_credits_and_calls_no_provider(engine: EngineApp) -> None:
    account = await engine.account(live=False)
    answer = await engine.ask(account, text_body(max_tokens=5))
    assert answer.code == "ok"
    (record,) = await engine.records(account)
    assert (record.live, record.provider) == (False, "sandbox")
    assert (await engine.balance(account)).spent == record.cost > 0
    assert not engine.upstream.requests


async def test_a_test_key_with_strict_handling_is_refused_what_the_vendor_would_not_take(
    engine: EngineApp,
) -> None:
    account = await engine.account(live=False)
    answer = await engine.ask(account, text_body(max_tokens=5, stop=["x"]), headers=STRICT)
    assert (answer.code, answer.error and answer.error.field) == ("invalid_parameter", "stop")
    assert answer.call.response_headers["Preference-Applied"] == "handling=strict"


async def test_another_accounts_upload_is_not_used(engine: EngineApp) -> None:
    owner, other = await engine.account(), await engine.account()
    task = TaskSpec(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = await engine.upload(owner, b"OggS" + b"audio" * 100)
    answer = await engine.ask(other, task)
    assert (answer.code, answer.error and answer.error.field) == ("invalid_parameter", "audio")
    assert task.speech_to_text.audio.media_id in engine.media()


async def test_an_upload_over_grpc_can_be_used_by_several_tasks(engine: EngineApp) -> None:
    account = await engine.account()
    task = TaskSpec(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = await engine.upload(account, b"OggS" + b"audio" * 100)
    for _ in range(2):
        assert (await engine.ask(account, task, protocol="grpc")).code == "ok"
    assert task.speech_to_text.audio.media_id in engine.media()


@pytest.mark.parametrize(("seconds", "code"), [(300.5, "ok"), (300.6, "invalid_parameter")])
async def test_audio_up_to_the_maximum_of_the_model_is_accepted(
    engine: EngineApp, seconds: float, code: str
) -> None:
    file = io.BytesIO()
    with wave.open(file, "wb") as audio:
        audio.setparams((1, 1, 8_000, 0, "NONE", ""))
        audio.writeframes(bytes(int(seconds * 8_000)))
    account = await engine.account()
    task = TaskSpec(model="eleven-labs-sts")
    task.speech_to_speech.audio.media_id = await engine.upload(account, file.getvalue())
    task.speech_to_speech.voice = "adam"
    answer = await engine.ask(account, task, protocol="grpc")
    assert answer.code == code
    if answer.error is not None:
        assert (answer.error.field, dict(answer.error.values)) == (
            "audio",
            {"expected": "audio of at most 300 seconds", "maximum": "300"},
        )
    engine.app.settings.data.joinpath("media", task.speech_to_speech.audio.media_id).unlink()


async def test_an_unreadable_upload_is_reported_as_store_unavailable(engine: EngineApp) -> None:
    account = await engine.account()
    task = TaskSpec(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = await engine.upload(account, b"OggS" + b"audio" * 100)
    path = engine.app.settings.data / "media" / task.speech_to_text.audio.media_id
    path.unlink()
    path.symlink_to(path)
    try:
        assert (await engine.ask(account, task)).code == "store_unavailable"
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("options", [{"response_format": "url"}, {"response_format": "b64_json"}])
@pytest.mark.parametrize("idempotent", [False, True])
async def test_an_answer_that_must_be_stored_is_refused_without_storage_space(
    engine: EngineApp, options: dict[str, str], idempotent: bool
) -> None:
    account = await engine.account("limited")
    await engine.upload(account, bytes(LIMIT))
    headers = {"idempotency-key": "k"} if idempotent else {}
    answer = await engine.ask(account, {**IMAGE, **options}, headers=headers)
    stored = idempotent or options["response_format"] == "url"
    assert answer.code == ("payload_too_large" if stored else "ok")
    assert bool(engine.upstream.requests) != stored
    if stored:
        assert "X-Credits-Charged" not in answer.call.response_headers
        assert (await engine.used(account)).requests == 0


@pytest.mark.parametrize(("live", "code"), [(False, "ok"), (True, "payload_too_large")])
async def test_space_is_needed_for_the_image_that_the_mode_of_the_key_draws(
    engine: EngineApp, live: bool, code: str
) -> None:
    """The sandbox draws 64 x 64 pixels, the vendor at least 256 x 256."""
    account = await engine.account("limited", live=live)
    await engine.upload(account, bytes(LIMIT - 64 * 1024))
    body = {**IMAGE, "width": 64, "height": 64, "response_format": "url"}
    assert (await engine.ask(account, body)).code == code


@STREAM
@PROTOCOL
@pytest.mark.parametrize("task_type", TASK_TYPES)
@pytest.mark.parametrize("delivery", [*MediaDelivery.values(), 4, 99])
async def test_a_delivery_is_one_of_its_values(
    engine: EngineApp, task_type: str, delivery: Any, protocol: str, stream: bool
) -> None:
    account = await engine.account(live=False)
    answer = await engine.ask(
        account,
        small_task(task_type),
        options=TaskOptions(delivery=delivery),
        protocol=protocol,
        stream=stream,
    )
    known = delivery in MediaDelivery.values()
    assert answer.code == ("ok" if known else "invalid_parameter")
    assert (answer.error is None) == known
    assert answer.error is None or answer.error.field == "delivery"


# --- routes


async def test_a_task_costs_the_price_of_its_first_configured_route(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 1_000, "completion_tokens": 100, "total_tokens": 1_100}
    async with open_engine(tmp_path, mistral_api_key=None) as second:
        second.upstream.script(Words("Hello", usage=usage))
        account = await second.account()
        assert (await second.ask(account, text_body(model="mixtral-8x7b", max_tokens=200))).code == "ok"
        (record,) = await second.records(account)
    assert record.provider == "openrouter"
    assert record.cost == math.ceil(1_100 * 0.54)
    assert "540000" in record.prices


@STREAM
@pytest.mark.parametrize("text", ["Hello", ""], ids=["some text", "no text"])
async def test_a_route_that_takes_over_reports_its_own_adjustments(
    engine: EngineApp, stream: bool, text: str
) -> None:
    account = await engine.account()
    engine.upstream.script(REVOKED, Words(text))
    body = text_body(model="mixtral-8x7b", max_tokens=20_000)
    key = {"idempotency-key": "k"}
    answer = await engine.ask(account, body, stream=stream, headers=key)
    assert answer.code == "ok"
    assert answer.call.response_headers["X-Pomelo-Adjusted"] == "max_tokens=16384"
    adjustments = (answer.events[0].started if stream else answer.events[0]).adjustments
    assert [(one.field, one.used) for one in adjustments] == [("max_tokens", "16384")]
    # The first route adjusts nothing, but the stored answer is the second's.
    strict = await engine.ask(account, body, stream=stream, headers=key | STRICT)
    assert (strict.code, strict.error and strict.error.field) == ("invalid_parameter", "max_tokens")
    of_answers = {"Idempotent-Replayed", "X-Credits-Charged", "X-Pomelo-Adjusted"}
    assert not of_answers.intersection(strict.call.response_headers)
    assert len(engine.upstream.requests) == 2


async def test_strict_handling_skips_a_second_route_that_would_adjust(engine: EngineApp) -> None:
    account = await engine.account()
    for max_tokens, code in ((16_384, "ok"), (16_385, "provider_failed")):
        engine.upstream.reset()
        engine.upstream.script(REVOKED, Words("Hello"))
        answer = await engine.ask(
            account, text_body(model="mixtral-8x7b", max_tokens=max_tokens), headers=STRICT
        )
        assert answer.code == code
        assert len(engine.upstream.requests) == (2 if code == "ok" else 1)
        assert answer.call.response_headers["Preference-Applied"] == "handling=strict"


# --- how much is reserved


async def test_without_max_tokens_an_answer_is_cut_to_what_the_account_can_pay(engine: EngineApp) -> None:
    account = await engine.account(micros=20_000)
    engine.upstream.script(Words("Hello"))
    assert (await engine.ask(account, text_body())).code == "ok"
    (request,) = engine.upstream.requests
    assert 900 < request.body["max_completion_tokens"] < 20_000 // 20


async def test_an_answer_is_cut_to_what_the_account_can_pay_beside_the_longest_possible_input(
    engine: EngineApp,
) -> None:
    account = await engine.account(micros=20_000)
    body = text_body("long " * 400)
    engine.upstream.script(Words("Hello"))
    assert (await engine.ask(account, body)).code == "ok"
    (request,) = engine.upstream.requests
    most = replace(
        estimate_of("gpt-4", to_task(body).text).maximum,
        output_tokens=request.body["max_completion_tokens"],
    )
    assert 19_900 < cost_at(most, MODELS["gpt-4"].prices.max_prices(most.input_tokens)) <= 20_000


async def test_without_max_tokens_a_task_reserves_its_share_of_the_balance(engine: EngineApp) -> None:
    account = await engine.account("limited", micros=200_000)
    gate = Gate()
    engine.upstream.when("share", Words("Hello", before=(gate,)))
    async with engine.app.services.tasks.stream_task(
        to_task(text_body("share")), TaskOptions(), call_of(account.key)
    ):
        status = await engine.used(account)
        assert (status.concurrency, status.available) == (1, 100_000)
    await engine.settled(account)


async def test_a_small_balance_is_not_shared(engine: EngineApp) -> None:
    account = await engine.account("limited", micros=10_000)
    engine.upstream.when("all", Words("Hello", before=(Gate(),)))
    async with engine.app.services.tasks.stream_task(
        to_task(text_body("all")), TaskOptions(), call_of(account.key)
    ):
        assert (await engine.used(account)).available == 0
    await engine.settled(account)


# --- the end user's id


@STREAM
@PROTOCOL
async def test_the_users_id_is_sent_to_a_provider_of_text_that_takes_one(
    engine: EngineApp, protocol: str, stream: bool
) -> None:
    account = await engine.account()
    spec = to_task(text_body())
    spec.user = "ann"
    answer = await engine.ask(account, spec, stream=stream, protocol=protocol)
    assert "X-Pomelo-Adjusted" not in answer.call.response_headers
    (request,) = engine.upstream.requests
    assert "ann" in request.body.values()
    drawing = small_task("image")
    drawing.user = "ann"
    answer = await engine.ask(account, drawing, stream=stream, protocol=protocol)
    assert "user" not in answer.call.response_headers.get("X-Pomelo-Adjusted", "")
    assert not any("ann" in one.body.values() for one in engine.upstream.requests[1:] if one.body)


@STREAM
async def test_a_route_that_takes_over_gets_the_users_id_that_the_first_does_not_take(
    engine: EngineApp, stream: bool
) -> None:
    account = await engine.account()
    engine.upstream.script(REVOKED, Words("Hello"))
    spec = to_task(text_body(model="mixtral-8x7b"))
    spec.user = "ann"
    answer = await engine.ask(account, spec, stream=stream)
    first, second = engine.upstream.requests
    assert ("ann" in first.body.values(), "ann" in second.body.values()) == (False, True)
    assert "X-Pomelo-Adjusted" not in answer.call.response_headers
    assert (await engine.records(account))[0].user == "ann"


async def test_a_provider_gets_the_account_and_the_deadline_of_its_task(tmp_path: Path) -> None:
    found: list[Any] = []

    class Capturing:
        configured = True

        async def text(self, job: Job[Any]) -> AsyncIterator[Event]:
            found.append((CALLER.get(), job.deadline, job.request_id, job.user))
            raise UpstreamError("provider_failed")
            yield Event()

        async def aclose(self) -> None: ...

    async with open_engine(tmp_path, {"openai": Capturing()}) as engine:
        account = await engine.account()
        for stream in (False, True):
            answer = await engine.ask(account, text_body(user="ada"), stream=stream)
            assert answer.code == "provider_failed"
            call = answer.call
            assert found.pop() == (account.wallet.account, call.deadline, call.request_id, "ada")
