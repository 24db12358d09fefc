"""Idempotency-Key over all protocols: a repeated request runs once, is charged once, and gets the same answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pomelo.gen.v1 import media_pb2, speech_pb2
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, TaskOptions
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.stores.base import Store
from pomelo.stores.ledger import REPLAY_SECONDS
from pomelo.stores.sqlite import open_sqlite
from pomelo.testing import Answer, Gate
from tests.app import Account, RunningApp, app_fixture, run_app
from tests.calls import bearer, upload_messages
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, PROTOCOLS, REST_PROTOCOL, Outcome, digest
from tests.tasks import AUDIO, TASK_BODIES, text_body, to_task

TASK_TYPE = pytest.mark.parametrize("task_type", TASK_BODIES)
RAW = "image/*, audio/*"

_numbers = itertools.count(1)

app = app_fixture()


def new_key() -> dict[str, str]:
    return {"Idempotency-Key": f"key-{next(_numbers)}"}


async def check_once(
    app: RunningApp, account: Account, first: Outcome, *others: Outcome, live: bool = False
) -> None:
    """Asserts that all outcomes are the same answer, and that it was charged once."""
    assert first.code == "ok", first
    (record,) = await app.records(account)
    balance = await app.balance(account, live=live)
    assert (balance.spent, balance.held) == (record.cost, 0)
    for outcome in others:
        assert outcome.code == "ok", outcome
        assert outcome.content == first.content != ""
        assert not outcome.usage or not first.usage or outcome.usage == first.usage
        assert not outcome.id or not first.id or outcome.id == first.id == record.task_id
        assert outcome.headers["x-credits-charged"] == "0"


# --- the same request


@PROTOCOL
async def test_a_repeated_stream_of_a_long_text_has_short_events(app: RunningApp, protocol: str) -> None:
    account, headers = await app.account(), new_key()
    text = "a \u0001é語🍊\u2028" * 60_000
    prompt = f"long {protocol}"
    app.upstream.when(prompt, Answer(text))
    first = await app.ask(protocol, account.live, text_body(prompt), headers=headers)
    again = await app.ask(protocol, account.live, text_body(prompt), stream=True, headers=headers)
    assert again.content == first.content == text
    await check_once(app, account, first, again, live=True)
    if protocol == "grpc":
        request = StreamTaskRequest(spec=to_task(text_body(prompt)))
        metadata = bearer(account.live, idempotency_key=headers["Idempotency-Key"])
        events = [e async for e in TaskServiceStub(app.channel).StreamTask(request, metadata=metadata)]
        assert max(event.ByteSize() for event in events) < 64 * 1024
        assert "".join(response.event.text_delta.text for response in events) == text
        return
    lines = await app.lines(protocol, account.live, text_body(prompt), headers)
    assert max(map(len, lines)) < 64 * 1024


@TASK_TYPE
@pytest.mark.parametrize("origin", [(w, s) for w in PROTOCOLS for s in (False, True)], ids=str)
async def test_a_repeat_returns_the_stored_answer_in_every_form(
    app: RunningApp, task_type: str, origin: tuple[str, bool]
) -> None:
    account = await app.account()
    headers = new_key()
    first = await app.ask(origin[0], account.test, TASK_BODIES[task_type], stream=origin[1], headers=headers)
    again = [
        await app.ask(protocol, account.test, TASK_BODIES[task_type], stream=stream, headers=headers)
        for protocol in PROTOCOLS
        for stream in (False, True)
    ]
    rest_only: list[dict[str, Any]] = [{"accept": RAW}, {"form": True}]
    again += [
        await app.ask(protocol, account.test, TASK_BODIES[task_type], headers=headers, **more)
        for protocol in ("rest", "remote")
        for more in rest_only
    ]
    await check_once(app, account, first, *again)


@pytest.mark.parametrize("task_type", ["image", "tts", "sts"])
@REST_PROTOCOL
async def test_raw_media_is_repeated_in_every_form(app: RunningApp, task_type: str, protocol: str) -> None:
    account = await app.account()
    headers = new_key()
    first = await app.ask(protocol, account.test, TASK_BODIES[task_type], accept=RAW, headers=headers)
    others = [
        await app.ask(other, account.test, TASK_BODIES[task_type], stream=stream, headers=headers)
        for other in PROTOCOLS
        for stream in (False, True)
    ]
    await check_once(app, account, first, *others)
    assert all(other.links for other in others), "only the repeats asked for a link"


@pytest.mark.parametrize("task_type", ["image", "tts", "sts"])
@pytest.mark.parametrize("response_format", ["url", "b64_json", None])
@PROTOCOL_AND_STREAM
async def test_media_is_repeated_in_the_requested_response_format(
    app: RunningApp, task_type: str, response_format: str | None, protocol: str, stream: bool
) -> None:
    account = await app.account()
    body = TASK_BODIES[task_type] | ({"response_format": response_format} if response_format else {})
    headers = new_key()
    first = await app.ask(protocol, account.test, body, stream=stream, headers=headers)
    again = await app.ask(protocol, account.test, body, stream=stream, headers=headers)
    await check_once(app, account, first, again)
    assert bool(first.links) == bool(again.links) == (response_format != "b64_json")


@TASK_TYPE
@PROTOCOL_AND_STREAM
async def test_a_repeat_calls_no_vendor(app: RunningApp, task_type: str, protocol: str, stream: bool) -> None:
    account = await app.account()
    headers = new_key()
    first = await app.ask(protocol, account.live, TASK_BODIES[task_type], stream=stream, headers=headers)
    before = len(app.upstream.requests)
    again = await app.ask(protocol, account.live, TASK_BODIES[task_type], stream=stream, headers=headers)
    assert len(app.upstream.requests) == before
    await check_once(app, account, first, again, live=True)


@PROTOCOL_AND_STREAM
async def test_one_of_fifty_concurrent_repeats_runs_and_the_others_conflict(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account("wide")
    prompt = f"fifty {protocol} {stream}"
    gate = Gate()
    app.upstream.when(prompt, Answer("done at last", at={1: gate}))
    headers = new_key()
    body = text_body(prompt, max_tokens=10)

    async def ask() -> Outcome:
        return await app.ask(protocol, account.live, body, stream=stream, headers=headers)

    repeats = [asyncio.create_task(ask()) for _ in range(50)]
    await gate.reached.wait()
    async with asyncio.timeout(20):
        conflicts = [await task for task in itertools.islice(asyncio.as_completed(repeats), 49)]
    for outcome in conflicts:
        assert outcome.code == "idempotency_conflict"
        assert outcome.headers["retry-after"] == "1"
    gate.open()
    (first,) = [one for one in await asyncio.gather(*repeats) if one not in conflicts]
    await check_once(app, account, first, await ask(), live=True)
    assert len([r for r in app.upstream.requests if prompt in r.prompt]) == 1


# --- a different request


@PROTOCOL_AND_STREAM
async def test_a_different_request_with_the_same_key_is_refused(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account()
    headers = new_key()
    first = await app.ask(protocol, account.test, text_body("this"), stream=stream, headers=headers)
    for body in (
        text_body("that"),
        text_body("this", max_tokens=9),
        text_body("this", model="gpt-3.5-turbo"),
        text_body("this", temperature=0.5),
        TASK_BODIES["image"],
        TASK_BODIES["stt"],
    ):
        outcome = await app.ask(protocol, account.test, body, stream=stream, headers=headers)
        assert outcome.code == "idempotency_mismatch"
        assert outcome.status == 422 or protocol == "grpc"
    await check_once(app, account, first)


@PROTOCOL
async def test_different_audio_is_a_different_request(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    headers = new_key()
    await app.ask(protocol, account.test, TASK_BODIES["stt"], headers=headers)
    other = TASK_BODIES["stt"] | {"audio": TASK_BODIES["stt"]["audio"][:-8]}
    assert (await app.ask(protocol, account.test, other, headers=headers)).code == "idempotency_mismatch"


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("value", ["", "two words", "x" * 256], ids=["empty", "spaced", "long"])
async def test_an_invalid_key_is_refused(app: RunningApp, value: str, protocol: str, stream: bool) -> None:
    account = await app.account()
    outcome = await app.ask(
        protocol, account.test, text_body(), stream=stream, headers={"Idempotency-Key": value}
    )
    assert outcome.code == "invalid_parameter"
    assert "Idempotency-Key" in outcome.message
    assert not await app.records(account)


@PROTOCOL_AND_STREAM
async def test_a_failed_task_releases_its_key(app: RunningApp, protocol: str, stream: bool) -> None:
    account = await app.account()
    headers = new_key()
    prompt = f"first it fails {protocol} {stream}"
    app.upstream.script()
    for trigger in ("[[error:provider_unavailable]]", "[[cut]]", "[[error:internal_error]]"):
        body = text_body(trigger)
        outcome = await app.ask(protocol, account.test, body, stream=stream, headers=headers)
        assert outcome.code not in ("ok", "idempotency_conflict", "idempotency_mismatch")
    outcome = await app.ask(protocol, account.test, text_body(prompt), stream=stream, headers=headers)
    assert outcome.code == "ok"


@PROTOCOL_AND_STREAM
async def test_a_rate_limited_request_stores_no_key_and_a_repeat_counts_toward_no_limit(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account("five")
    headers = new_key()
    first = await app.ask(protocol, account.test, text_body(), stream=stream, headers=headers)
    for _ in range(4):
        await app.ask(protocol, account.test, text_body(), stream=stream)
    refused = new_key()
    for body in (text_body(), text_body("x")):
        outcome = await app.ask(protocol, account.test, body, stream=stream, headers=refused)
        assert outcome.code == "rate_limit_exceeded"
    again = await app.ask(protocol, account.test, text_body(), stream=stream, headers=headers)
    assert (again.code, again.content, again.id) == ("ok", first.content, first.id)
    assert again.headers["x-ratelimit-remaining"] == "0"


@PROTOCOL
async def test_accounts_and_modes_have_separate_keys(app: RunningApp, protocol: str) -> None:
    one, other = await app.account(), await app.account()
    headers = new_key()
    answers = [
        await app.ask(protocol, secret, text_body(), headers=headers)
        for secret in (one.test, one.live, other.test, other.live)
    ]
    assert len({outcome.id for outcome in answers}) == 4
    for account in (one, other):
        assert len(await app.records(account)) == 2


# --- audio


async def test_audio_is_the_same_request_in_every_form(app: RunningApp) -> None:
    account = await app.account()
    headers = new_key()
    first = await app.ask("rest", account.test, TASK_BODIES["sts"], headers=headers)
    form = await app.ask("remote", account.test, TASK_BODIES["sts"], form=True, headers=headers)
    inline = await app.ask("grpc", account.test, TASK_BODIES["sts"], headers=headers)
    chunks = iter(upload_messages(AUDIO, "audio/mpeg"))
    metadata = bearer(account.test, idempotency_key=headers["Idempotency-Key"])
    media = MediaServiceStub(app.channel)
    stored = (await media.UploadMedia(chunks, metadata=bearer(account.test))).media
    audio = media_pb2.MediaSource(media_id=stored.id)
    speech = speech_pb2.SpeechToSpeechInput(audio=audio, voice="adam")
    options = TaskOptions(delivery=media_pb2.MEDIA_DELIVERY_INLINE)
    task = TaskSpec(model="eleven-labs-sts", speech_to_speech=speech)
    by_id = await TaskServiceStub(app.channel).RunTask(
        RunTaskRequest(spec=task, options=options), metadata=metadata
    )
    await check_once(app, account, first, form, inline)
    assert by_id.result.id == first.id
    assert digest(by_id.result.speech.data) == first.content
    assert not by_id.result.speech.HasField("media")


# --- expiry


class Clock:
    """Unix time that a test can advance."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        """Returns monotonic time, advanced by the same seconds."""
        return time.monotonic() + self.ahead


@asynccontextmanager
async def app_with_clock(folder: Path) -> AsyncIterator[tuple[RunningApp, Clock]]:
    """Runs an app whose clock a test can advance."""
    clock = Clock()
    async with open_sqlite(folder / "own.db", now=clock, monotonic=clock.monotonic) as store:

        def instead(_: Store) -> Store:
            return store

        async with run_app(folder, wrap_store=instead, now=clock) as app:
            yield app, clock


@PROTOCOL
async def test_an_answer_and_its_media_are_stored_for_a_day(tmp_path: Path, protocol: str) -> None:
    async with app_with_clock(tmp_path) as (app, clock):
        account = await app.account()
        keys = {task_type: new_key() for task_type in TASK_BODIES}
        first = {
            k: await app.ask(protocol, account.test, TASK_BODIES[k], headers=keys[k]) for k in TASK_BODIES
        }
        links = {k: outcome.links for k, outcome in first.items() if outcome.links}
        assert set(links) == {"image", "tts", "sts"}
        for hours in (2, 22, 23.9):
            clock.ahead = hours * 3600
            for task_type, outcome in first.items():
                again = await app.ask(protocol, account.test, TASK_BODIES[task_type], headers=keys[task_type])
                assert (again.code, again.id, again.content) == ("ok", outcome.id, outcome.content)
                assert len(again.links) == len(outcome.links), "a new link, which worked"
        assert len(await app.records(account)) == len(TASK_BODIES)
        clock.ahead = REPLAY_SECONDS + 1
        for task_type, outcome in first.items():
            expired = await app.ask(protocol, account.test, TASK_BODIES[task_type], headers=keys[task_type])
            assert expired.code == "ok"
            assert expired.id != outcome.id
        assert len(await app.records(account)) == 2 * len(TASK_BODIES)


async def test_inline_media_is_repeated_after_the_links_have_expired(tmp_path: Path) -> None:
    async with app_with_clock(tmp_path) as (app, clock):
        account = await app.account()
        headers = new_key()
        body = TASK_BODIES["image"] | {"response_format": "b64_json"}
        first = await app.ask("rest", account.test, body, headers=headers)
        clock.ahead = 20 * 3600
        again = await app.ask("grpc", account.test, body, headers=headers)
        assert (again.content, again.links) == (first.content, ())


async def test_a_repeat_has_the_same_creation_time(app: RunningApp) -> None:
    account = await app.account()
    headers = new_key()
    first, again = [
        await (await app.post("rest", account.test, json=text_body(), headers=headers)).json()
        for _ in range(2)
    ]
    assert first == again
