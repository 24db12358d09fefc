"""The cost, usage record, limits and headers of tasks that succeed, fail or are cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

import pytest

from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.runtime.in_flight import MIB
from pomelo.tasks.base import LARGE
from pomelo.testing import Answer as Words
from pomelo.testing import Gate, Speech
from pomelo.testing import error_reply as openai_error
from tests.calls import call_of, refusal
from tests.tasks import small_task, text_body, to_task
from tests.unit.engine.apps import STREAM, Answer, EngineApp
from tests.unit.refusals import refused
from tests.unit.telemetry.reports import Reports

AUDIO = b"OggS" + b"some audio" * 100
USAGE = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
COST = 100 * 4 + 7 * 20
"""Microcredits of USAGE at the prices of gpt-4."""


def text_task(text: str, **more: Any) -> dict[str, Any]:
    return text_body(text, max_tokens=9, **more)


@STREAM
async def test_a_finished_task_is_charged_recorded_and_reported(engine: EngineApp, stream: bool) -> None:
    account = await engine.account("limited")
    engine.upstream.when("finished", Words("größe über alles", usage=USAGE))
    answer = await engine.ask(account, text_task("finished"), stream=stream)
    assert answer.code == "ok"
    assert answer.call.settling, "a shutdown would end it although it is charged"
    (record,) = await engine.records(account)
    assert (record.cost, record.input_tokens, record.output_tokens) == (COST, 100, 7)
    assert (record.source, record.complete, record.live, record.wire) == ("provider", True, True, "rest")
    assert (record.provider, record.model, record.task_type) == ("openai", "gpt-4", "text")
    assert record.request_id == answer.call.request_id
    assert record.output_bytes == len("größe über alles".encode())
    assert 0 <= record.first_byte_ms <= record.processing_ms < 10_000
    used = await engine.used(account)
    assert (used.requests, used.concurrency, used.tokens) == (1, 0, 107)
    balance = await engine.balance(account)
    assert (balance.spent, balance.held) == (COST, 0)
    for reported in (answer.call.response_headers, answer.call.response_trailers):
        assert reported["X-Credits-Charged"] == "0.00054"
        assert reported["X-Credits-Remaining"] == "999.99946"
        assert reported["X-RateLimit-Remaining-Tokens"] == str(100_000 - 107)
        assert reported["X-RateLimit-Remaining-Concurrent"] == "2"
    created = answer.events[0].started.create_time if stream else answer.events[0].create_time
    assert time.time() - 60 < created.seconds <= time.time()


@STREAM
async def test_an_answer_that_the_provider_did_not_count_is_recorded_as_estimated(
    engine: EngineApp, stream: bool
) -> None:
    account = await engine.account()
    engine.upstream.when("uncounted", Words("one two three", usage=None))
    assert (await engine.ask(account, text_task("uncounted"), stream=stream)).code == "ok"
    (record,) = await engine.records(account)
    assert (record.source, record.complete, record.output_tokens) == ("estimated", True, 3)


async def test_the_time_to_the_first_byte_is_that_of_the_first_piece(engine: EngineApp) -> None:
    account = await engine.account()
    engine.upstream.when("slowly", Words("one two", at={1: 0.2}))
    assert (await engine.ask(account, text_task("slowly"), stream=True)).code == "ok"
    (record,) = await engine.records(account)
    assert record.first_byte_ms < record.processing_ms - 100


@STREAM
async def test_a_task_that_fails_before_any_output_costs_nothing(engine: EngineApp, stream: bool) -> None:
    account = await engine.account("limited")
    engine.upstream.when("forbidden", openai_error(400, code="content_policy_violation"))
    answer = await engine.ask(account, text_task("forbidden"), stream=stream)
    assert answer.code == "content_policy_violation"
    used = await engine.used(account)
    assert (used.requests, used.concurrency) == (1, 0)
    assert not await engine.records(account)
    assert (await engine.balance(account)).available == 10**9
    for reported in (answer.call.response_headers, answer.call.response_trailers):
        assert reported["X-Credits-Charged"] == "0"
        assert reported["X-Credits-Remaining"] == "1000"
        assert reported["X-RateLimit-Remaining-Concurrent"] == "2"


@pytest.mark.parametrize("error", [None, ConnectionResetError()], ids=["ends", "fails"])
async def test_a_stream_whose_caller_leaves_costs_its_input_and_its_delivered_output(
    engine: EngineApp, error: Exception | None
) -> None:
    account = await engine.account("limited")
    gate = Gate()
    engine.upstream.when("to be left", Words("one two three", at={2: gate}))
    call, words = call_of(account.key), 0
    with suppress(ConnectionResetError):
        async with engine.app.services.tasks.stream_task(
            to_task(text_task("to be left")), TaskOptions(), call
        ) as events:
            async for event in events:
                words += bool(event.text_delta.text)
                if words == 2:
                    if error is not None:
                        raise error
                    break
    await engine.settled(account)
    (record,) = await engine.records(account)
    assert record.code == "cancelled"
    assert await engine.failures(account) == [record]
    assert (record.complete, record.source, record.output_tokens) == (False, "estimated", 2)
    assert record.output_bytes == len("one two")
    assert record.cost == record.input_tokens * 4 + 2 * 20
    used = await engine.used(account)
    assert used.tokens == record.input_tokens + 2
    assert (await engine.balance(account)).spent == record.cost


async def test_a_task_that_is_cancelled_before_any_output_costs_nothing(engine: EngineApp) -> None:
    account = await engine.account("limited")
    engine.upstream.when("left early", Words("one", before=(Gate(),)))
    async with engine.app.services.tasks.stream_task(
        to_task(text_task("left early")), TaskOptions(), call_of(account.key)
    ):
        assert (await engine.used(account)).concurrency == 1
    await engine.settled(account)
    assert not await engine.records(account)
    assert (await engine.balance(account)).available == 10**9


async def test_a_cost_that_is_known_before_is_reported_before_the_first_event(engine: EngineApp) -> None:
    account = await engine.account()
    for body, charged in (
        ({"model": "flux-1-pro", "prompt": "A kite"}, "0.04"),
        ({"model": "eleven-labs-tts", "text": "x" * 100, "voice": "adam"}, "0.008"),
        (text_task("anything"), None),
    ):
        call = call_of(account.key)
        async with engine.app.services.tasks.stream_task(to_task(body), TaskOptions(), call):
            assert call.response_headers.get("X-Credits-Charged") == charged
            assert "X-Credits-Remaining" in call.response_headers


async def test_the_uncollected_part_of_a_cost_is_recorded_and_logged(
    engine: EngineApp, caplog: pytest.LogCaptureFixture
) -> None:
    account = await engine.account(micros=5_000)
    usage = {"prompt_tokens": 100, "completion_tokens": 1_000, "total_tokens": 1_100}
    engine.upstream.when("too dear", Words("one", usage=usage))
    with caplog.at_level(logging.ERROR):
        answer = await engine.ask(account, text_task("too dear"))
    assert answer.code == "ok"
    assert answer.call.response_headers["X-Credits-Charged"] == "0.005"
    (record,) = await engine.records(account)
    assert (record.cost, record.uncollected) == (5_000, 100 * 4 + 1_000 * 20 - 5_000)
    assert (await engine.balance(account)).available == 0
    (entry,) = [one for one in caplog.records if "uncollected" in one.getMessage()]
    assert account.wallet.account in entry.getMessage()
    assert "0.0154" in entry.getMessage()
    assert entry.__dict__["unlimited"]


async def test_the_record_of_a_large_answer_by_link_has_its_size(engine: EngineApp) -> None:
    account = await engine.account()
    engine.upstream.when("a long speech", Speech(size=70_000))
    body = {"model": "eleven-labs-tts", "text": "a long speech", "voice": "adam", "response_format": "url"}
    answer = await engine.ask(account, body)
    assert answer.code == "ok"
    (record,) = await engine.records(account)
    assert record.output_bytes == answer.events[0].speech.media.size_bytes >= 70_000


@STREAM
async def test_a_repeated_request_costs_nothing_and_reports_the_same_adjustments(
    engine: EngineApp, reports: Reports, stream: bool
) -> None:
    account = await engine.account("limited")
    engine.upstream.when(f"again {stream}", Words("one two", usage=USAGE))
    answers = [
        await engine.ask(
            account, text_task(f"again {stream}", stop=["x"]), stream=stream, headers={"idempotency-key": "k"}
        )
        for _ in range(2)
    ]
    assert [answer.code for answer in answers] == ["ok", "ok"]
    assert [answer.call.reserved for answer in answers] == [True, True], (
        "else its refusal counts as a request"
    )
    assert [report.replayed for report in reports.tasks[-2:]] == [False, True]
    first, second = answers
    assert {answer.call.response_headers["X-Pomelo-Adjusted"] for answer in answers} == {"stop"}
    assert "Idempotent-Replayed" not in first.call.response_headers
    assert second.call.response_headers["Idempotent-Replayed"] == "true"
    assert second.call.response_headers["X-Credits-Charged"] == "0"
    assert second.call.response_headers["X-RateLimit-Remaining"] == "4"
    if stream:
        assert second.text == first.text
        assert second.events[0] == first.events[0]
    else:
        assert second.events == first.events
    assert (await engine.balance(account)).spent == COST
    assert len(await engine.records(account)) == 1


async def test_a_replay_that_its_caller_reads_slowly_ends_at_the_deadline(engine: EngineApp) -> None:
    account, spec, key = await engine.account(), small_task("text"), {"idempotency-key": "slow"}
    assert (await engine.ask(account, spec, headers=key)).code == "ok"
    call = call_of(account.key, 2.0, idempotency_key="slow")
    with refused("deadline_exceeded"):
        async with (
            asyncio.timeout(20),
            engine.app.services.tasks.stream_task(spec, TaskOptions(), call) as events,
        ):
            assert (await anext(events)).HasField("started")
            assert call.response_headers["Idempotent-Replayed"] == "true"
            await asyncio.Event().wait()


async def test_a_replay_is_refused_while_its_caller_has_too_much_to_read(engine: EngineApp) -> None:
    account, spec = await engine.account(), small_task("text_to_speech")
    run, call = engine.app.services.tasks.run_task, call_of(account.key, idempotency_key="k")
    first = await run(spec, TaskOptions(), call_of(account.key, idempotency_key="k"))
    visit = await engine.app.services.access.admit(call)
    read = visit.hold(300 * MIB)
    assert (await refusal(run(spec, TaskOptions(), call))).code == "overloaded"
    assert "Idempotent-Replayed" not in call.response_headers
    read()
    assert (await run(spec, TaskOptions(), call)).speech.data == first.speech.data
    visit.close()


async def test_the_stored_text_of_a_replay_is_counted_before_the_replay_waits(
    engine: EngineApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def turn(*arguments: object) -> None:
        waiting.extend(sizes)

    account, sizes, waiting = await engine.account(), list[int](), list[int]()
    run, call = engine.app.services.tasks.run_task, call_of(account.key, idempotency_key="k")
    await run(small_task("text"), TaskOptions(), call_of(account.key, idempotency_key="k"))
    monkeypatch.setattr("pomelo.engine.idempotency.ReplayQueue.turn", turn)
    call.reserve = sizes.append
    text = (await run(small_task("text"), TaskOptions(), call)).text.message.content[0].text
    assert waiting == sizes
    assert waiting[0] > len(text)


async def test_the_large_replays_of_an_account_take_turns_and_delay_no_other_account(
    engine: EngineApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.engine.idempotency.REPLAY_RATE", 1)  # byte a second
    one, other = await engine.account(), await engine.account()
    spec, key = small_task("text_to_speech"), {"idempotency-key": "k"}
    links = TaskOptions(delivery=MediaDelivery.MEDIA_DELIVERY_LINK)
    for account in (one, other):
        engine.upstream.script(Speech(size=LARGE + 1))
        assert (await engine.ask(account, spec, headers=key)).code == "ok"
    assert (await engine.ask(one, spec, headers=key)).code == "ok"
    waiting = asyncio.create_task(engine.ask(one, spec, headers=key))
    assert (await engine.ask(other, spec, headers=key)).code == "ok"
    assert (await engine.ask(one, spec, headers=key, options=links)).code == "ok"
    assert (await engine.ask(one, spec, headers=key, stream=True)).code == "ok"
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])


@STREAM
async def test_a_repeated_request_may_ask_for_another_delivery_but_not_for_another_user_or_metadata(
    engine: EngineApp, stream: bool
) -> None:
    account = await engine.account()
    key = {"idempotency-key": "labels"}

    async def ask(delivery: MediaDelivery.ValueType, user: str, **metadata: str) -> Answer:
        spec = small_task("image")
        spec.user = user
        spec.metadata.update(metadata)
        options = TaskOptions(delivery=delivery)
        return await engine.ask(account, spec, options=options, stream=stream, headers=key)

    for delivery in MediaDelivery.values():
        answer = await ask(delivery, "ann", a="1", b="2")
        assert answer.code == "ok"
        replayed = answer.call.response_headers.get("Idempotent-Replayed")
        assert replayed == (None if delivery == MediaDelivery.MEDIA_DELIVERY_UNSPECIFIED else "true")
        result = answer.events[-1].completed if stream else answer.events[0]
        (image,) = result.image.images
        assert bool(image.data) == (delivery != MediaDelivery.MEDIA_DELIVERY_LINK)
        assert image.HasField("media") == (delivery != MediaDelivery.MEDIA_DELIVERY_INLINE)
    assert (await ask(MediaDelivery.MEDIA_DELIVERY_BOTH, "ann", b="2", a="1")).code == "ok"
    for user, metadata in (("bob", {"a": "1", "b": "2"}), ("ann", {"a": "1"}), ("", {})):
        assert (await ask(MediaDelivery.MEDIA_DELIVERY_BOTH, user, **metadata)).code == "idempotency_mismatch"
    assert len(await engine.records(account)) == 1


async def test_the_upload_of_a_repeated_request_is_deleted(engine: EngineApp) -> None:
    account = await engine.account()
    for _ in range(2):
        task = TaskSpec(model="eleven-labs-stt")
        task.speech_to_text.audio.media_id = await engine.upload(account, AUDIO)
        before = engine.media()
        assert task.speech_to_text.audio.media_id in before
        assert (await engine.ask(account, task, headers={"idempotency-key": "upload"})).code == "ok"
        assert task.speech_to_text.audio.media_id not in engine.media()
    assert len(await engine.records(account)) == 1


async def test_the_upload_of_a_repeated_stream_is_deleted_before_the_stream_is_read(
    engine: EngineApp,
) -> None:
    account, task = await engine.account(), TaskSpec(model="eleven-labs-stt")
    audio = task.speech_to_text.audio
    audio.media_id = await engine.upload(account, AUDIO)
    assert (await engine.ask(account, task, headers={"idempotency-key": "read"}, stream=True)).code == "ok"
    audio.media_id = await engine.upload(account, AUDIO)
    call = call_of(account.key, idempotency_key="read")
    async with engine.app.services.tasks.stream_task(task, TaskOptions(), call):
        assert call.response_headers["Idempotent-Replayed"] == "true"
        assert audio.media_id not in engine.media()


async def test_an_invalid_header_is_refused_before_the_task_is_validated(engine: EngineApp) -> None:
    account = await engine.account("limited")
    for headers in ({"x-request-timeout": "soon"}, {"idempotency-key": "two words"}):
        answer = await engine.ask(account, {"model": "unknown"}, headers=headers)
        assert answer.code == "invalid_parameter"
        assert answer.call.response_headers["X-RateLimit-Remaining"] == "5"
