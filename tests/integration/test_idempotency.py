"""Idempotency-Key over the real wires: the same request is done once, charged once, and answered again."""

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
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.stores.base import Store
from pomelo.stores.ledger import REPLAY_SECONDS
from pomelo.stores.sqlite import open_sqlite
from pomelo.testing import Answer, Gate
from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOLS, Outcome, digest
from tests.tasks import TASK_BODIES, text_body, to_task

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
KIND = pytest.mark.parametrize("kind", TASK_BODIES)
RAW = "image/*, audio/*"

_numbers = itertools.count(1)


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("repeats")) as opened:
        yield opened


def key() -> dict[str, str]:
    """A new Idempotency-Key."""
    return {"Idempotency-Key": f"key-{next(_numbers)}"}


async def check_once(
    house: RunningApp, caller: Account, first: Outcome, *others: Outcome, live: bool = False
) -> None:
    """All are the same answer, and one charge."""
    assert first.code == "ok", first
    (record,) = await house.records(caller)
    balance = await house.balance(caller, live=live)
    assert (balance.spent, balance.held) == (record.cost, 0)
    for told in others:
        assert told.code == "ok", told
        assert told.content == first.content != ""
        assert not told.usage or not first.usage or told.usage == first.usage
        assert not told.id or not first.id or told.id == first.id == record.task_id
        assert told.headers["x-credits-charged"] == "0"


# --- the same again


@WAY
async def test_a_repeated_stream_of_a_long_text_has_short_events(house: RunningApp, way: str) -> None:
    caller, headers = await house.account(), key()
    text = "a \u0001é語🍊\u2028" * 60_000
    prompt = f"long {way}"
    house.upstream.when(prompt, Answer(text))
    body = text_body(prompt) | {"stream": True}
    begun = await house.ask(way, caller.live, text_body(prompt), headers=headers)
    again = await house.ask(way, caller.live, text_body(prompt), stream=True, headers=headers)
    assert again.content == begun.content == text
    await check_once(house, caller, begun, again, live=True)
    if way == "grpc":
        request = StreamTaskRequest(task=to_task(text_body(prompt)))
        metadata = [
            ("authorization", f"Bearer {caller.live}"),
            ("idempotency-key", headers["Idempotency-Key"]),
        ]
        events = [e async for e in TaskServiceStub(house.channel).StreamTask(request, metadata=metadata)]
        assert max(event.ByteSize() for event in events) < 64 * 1024
        assert "".join(event.text_delta.content for event in events) == text
        return
    headers |= {"Authorization": f"Bearer {caller.live}"}
    async with house.session.post(house.urls[way] + "/api/v1/task", json=body, headers=headers) as answer:
        lines = [line async for line in answer.content]  # aiohttp refuses a long one
    assert max(map(len, lines)) < 64 * 1024


@KIND
@pytest.mark.parametrize("first", [(w, s) for w in PROTOCOLS for s in (False, True)], ids=str)
async def test_a_repeat_is_the_stored_answer_however_it_is_asked(
    house: RunningApp, kind: str, first: tuple[str, bool]
) -> None:
    caller = await house.account()
    headers = key()
    begun = await house.ask(first[0], caller.test, TASK_BODIES[kind], stream=first[1], headers=headers)
    again = [
        await house.ask(way, caller.test, TASK_BODIES[kind], stream=stream, headers=headers)
        for way in PROTOCOLS
        for stream in (False, True)
    ]
    raw = [
        await house.ask(way, caller.test, TASK_BODIES[kind], accept=RAW, headers=headers)
        for way in ("rest", "remote")
    ]
    forms = [
        await house.ask(way, caller.test, TASK_BODIES[kind], form=True, headers=headers)
        for way in ("rest", "remote")
    ]
    await check_once(house, caller, begun, *again, *raw, *forms)


@pytest.mark.parametrize("kind", ["image", "tts", "sts"])
@pytest.mark.parametrize("way", ["rest", "remote"])
async def test_raw_bytes_are_repeated_in_any_form(house: RunningApp, kind: str, way: str) -> None:
    caller = await house.account()
    headers = key()
    begun = await house.ask(way, caller.test, TASK_BODIES[kind], accept=RAW, headers=headers)
    others = [
        await house.ask(other, caller.test, TASK_BODIES[kind], stream=stream, headers=headers)
        for other in PROTOCOLS
        for stream in (False, True)
    ]
    await check_once(house, caller, begun, *others)
    assert all(other.links for other in others), "a link was not asked for at first, but is now"


@pytest.mark.parametrize("kind", ["image", "tts", "sts"])
@pytest.mark.parametrize("wanted", ["url", "b64_json", None])
@HOW
@WAY
async def test_the_bytes_come_back_as_they_are_asked_for(
    house: RunningApp, kind: str, wanted: str | None, way: str, stream: bool
) -> None:
    caller = await house.account()
    body = TASK_BODIES[kind] | ({"response_format": wanted} if wanted else {})
    headers = key()
    begun = await house.ask(way, caller.test, body, stream=stream, headers=headers)
    again = await house.ask(way, caller.test, body, stream=stream, headers=headers)
    await check_once(house, caller, begun, again)
    assert bool(begun.links) == bool(again.links) == (wanted != "b64_json")


@KIND
@WAY
@HOW
async def test_the_vendor_is_asked_once(house: RunningApp, kind: str, way: str, stream: bool) -> None:
    caller = await house.account()
    headers = key()
    begun = await house.ask(way, caller.live, TASK_BODIES[kind], stream=stream, headers=headers)
    before = len(house.upstream.requests)
    again = await house.ask(way, caller.live, TASK_BODIES[kind], stream=stream, headers=headers)
    assert len(house.upstream.requests) == before
    await check_once(house, caller, begun, again, live=True)


@WAY
@HOW
async def test_of_fifty_at_once_one_runs_and_the_others_are_told_to_wait(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account("wide")
    prompt = f"fifty {way} {stream}"
    gate = Gate()
    house.upstream.when(prompt, Answer("done at last", at={1: gate}))
    headers = key()
    body = text_body(prompt, max_tokens=10)

    async def ask() -> Outcome:
        return await house.ask(way, caller.live, body, stream=stream, headers=headers)

    asked = [asyncio.create_task(ask()) for _ in range(50)]
    await gate.reached.wait()
    done: set[asyncio.Task[Outcome]] = set()
    async with asyncio.timeout(20):
        while len(done) < 49:
            done, running = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            asked = list(running) + list(done)
            await asyncio.sleep(0)
            done = {task for task in asked if task.done()}
    for task in done:
        told = task.result()
        assert told.code == "idempotency_conflict"
        assert told.headers["retry-after"] == "1"
    gate.open()
    (first,) = [await task for task in asked if task not in done]
    await check_once(house, caller, first, await ask(), live=True)
    assert len([r for r in house.upstream.requests if prompt in r.prompt]) == 1


# --- another request


@WAY
@HOW
async def test_another_request_under_the_same_key_is_refused(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account()
    headers = key()
    begun = await house.ask(way, caller.test, text_body("this"), stream=stream, headers=headers)
    for body in (
        text_body("that"),
        text_body("this", max_tokens=9),
        text_body("this", model="gpt-3.5-turbo"),
        text_body("this", temperature=0.5),
        TASK_BODIES["image"],
        TASK_BODIES["stt"],
    ):
        told = await house.ask(way, caller.test, body, stream=stream, headers=headers)
        assert told.code == "idempotency_mismatch"
        assert told.status == 422 or way == "grpc"
    await check_once(house, caller, begun)


@WAY
async def test_of_a_sound_another_one_is_another_request(house: RunningApp, way: str) -> None:
    caller = await house.account()
    headers = key()
    await house.ask(way, caller.test, TASK_BODIES["stt"], headers=headers)
    other = TASK_BODIES["stt"] | {"audio": TASK_BODIES["stt"]["audio"][:-8]}
    assert (await house.ask(way, caller.test, other, headers=headers)).code == "idempotency_mismatch"


@WAY
@HOW
@pytest.mark.parametrize("given", ["", "two words", "x" * 256], ids=["empty", "spaced", "long"])
async def test_a_key_that_is_none_is_refused(house: RunningApp, given: str, way: str, stream: bool) -> None:
    caller = await house.account()
    told = await house.ask(way, caller.test, text_body(), stream=stream, headers={"Idempotency-Key": given})
    assert told.code == "invalid_parameter"
    assert "Idempotency-Key" in told.message
    assert not await house.records(caller)


@WAY
@HOW
async def test_a_task_that_failed_frees_its_key(house: RunningApp, way: str, stream: bool) -> None:
    caller = await house.account()
    headers = key()
    prompt = f"first it fails {way} {stream}"
    house.upstream.script()
    for body in (
        text_body("[[error:provider_unavailable]]"),
        text_body("[[cut]]"),
        text_body("[[error:internal_error]]"),
    ):
        told = await house.ask(way, caller.test, body, stream=stream, headers=headers)
        assert told.code not in ("ok", "idempotency_conflict", "idempotency_mismatch")
    told = await house.ask(way, caller.test, text_body(prompt), stream=stream, headers=headers)
    assert told.code == "ok"


@WAY
@HOW
async def test_what_is_refused_by_a_limit_takes_no_key_and_a_repeat_needs_none(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account("five")
    headers = key()
    first = await house.ask(way, caller.test, text_body(), stream=stream, headers=headers)
    for _ in range(4):
        await house.ask(way, caller.test, text_body(), stream=stream)
    refused = key()
    assert (
        await house.ask(way, caller.test, text_body(), stream=stream, headers=refused)
    ).code == "rate_limit_exceeded"
    assert (
        await house.ask(way, caller.test, text_body("x"), stream=stream, headers=refused)
    ).code == "rate_limit_exceeded"
    again = await house.ask(way, caller.test, text_body(), stream=stream, headers=headers)
    assert (again.code, again.content, again.id) == ("ok", first.content, first.id)
    assert again.headers["x-ratelimit-remaining"] == "0"


@WAY
async def test_accounts_and_modes_have_keys_of_their_own(house: RunningApp, way: str) -> None:
    one, other = await house.account(), await house.account()
    headers = key()
    answers = [
        await house.ask(way, secret, text_body(), headers=headers)
        for secret in (one.test, one.live, other.test, other.live)
    ]
    assert len({told.id for told in answers}) == 4
    for caller in (one, other):
        assert len(await house.records(caller)) == 2


# --- sounds


async def test_a_sound_is_the_same_however_it_comes(house: RunningApp) -> None:
    caller = await house.account()
    sound = b"some sound " * 400
    headers = key()
    begun = await house.ask("rest", caller.test, TASK_BODIES["sts"], headers=headers)
    form = await house.ask("remote", caller.test, TASK_BODIES["sts"], form=True, headers=headers)
    inline = await house.ask("grpc", caller.test, TASK_BODIES["sts"], headers=headers)

    async def pieces() -> AsyncIterator[UploadMediaRequest]:
        yield UploadMediaRequest(content_type="audio/mpeg")
        yield UploadMediaRequest(chunk=sound)

    metadata = [("authorization", f"Bearer {caller.test}")]
    stored = (await MediaServiceStub(house.channel).UploadMedia(pieces(), metadata=metadata)).media
    given = speech_pb2.SpeechToSpeechInput(
        audio=speech_pb2.AudioInput(media_id=stored.media_id),
        voice="adam",
        response_format=media_pb2.RESPONSE_FORMAT_B64_JSON,
    )
    task = Task(model="eleven-labs-sts", speech_to_speech=given)
    metadata.append(("idempotency-key", headers["Idempotency-Key"]))
    named = await TaskServiceStub(house.channel).RunTask(RunTaskRequest(task=task), metadata=metadata)
    await check_once(house, caller, begun, form, inline)
    assert named.result.id == begun.id
    assert digest(named.result.speech.data) == begun.content
    assert not named.result.speech.HasField("media")


# --- how long


class Clock:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        """The same for who measures."""
        return time.monotonic() + self.ahead


@asynccontextmanager
async def a_day(folder: Path) -> AsyncIterator[tuple[RunningApp, Clock]]:
    """A house whose time a test moves."""
    clock = Clock()
    async with open_sqlite(folder / "own.db", now=clock, monotonic=clock.monotonic) as store:

        def instead(_: Store) -> Store:
            return store

        async with run_app(folder, wrap_store=instead, now=clock) as house:
            yield house, clock


@WAY
async def test_an_answer_lives_for_a_day_and_so_do_its_media(tmp_path: Path, way: str) -> None:
    async with a_day(tmp_path) as (house, clock):
        caller = await house.account()
        asked = {kind: key() for kind in TASK_BODIES}
        first = {k: await house.ask(way, caller.test, TASK_BODIES[k], headers=asked[k]) for k in TASK_BODIES}
        links = {k: told.links for k, told in first.items() if told.links}
        assert set(links) == {"image", "tts", "sts"}
        for hours in (2, 22, 23.9):
            clock.ahead = hours * 3600
            for kind, told in first.items():
                again = await house.ask(way, caller.test, TASK_BODIES[kind], headers=asked[kind])
                assert (again.code, again.id, again.content) == ("ok", told.id, told.content)
                assert len(again.links) == len(told.links), "a fresh link, which worked"
        assert len(await house.records(caller)) == len(TASK_BODIES)
        clock.ahead = REPLAY_SECONDS + 1
        for kind, told in first.items():
            anew = await house.ask(way, caller.test, TASK_BODIES[kind], headers=asked[kind])
            assert anew.code == "ok"
            assert anew.id != told.id
        assert len(await house.records(caller)) == 2 * len(TASK_BODIES)


async def test_bytes_alone_are_repeated_after_the_hour_of_a_link(tmp_path: Path) -> None:
    async with a_day(tmp_path) as (house, clock):
        caller = await house.account()
        headers = key()
        body = TASK_BODIES["image"] | {"response_format": "b64_json"}
        first = await house.ask("rest", caller.test, body, headers=headers)
        clock.ahead = 20 * 3600
        again = await house.ask("grpc", caller.test, body, headers=headers)
        assert (again.content, again.links) == (first.content, ())


async def test_a_repeat_tells_of_the_same_moment(house: RunningApp) -> None:
    caller = await house.account()
    headers = key() | {"Authorization": f"Bearer {caller.test}"}
    url = f"{house.urls['rest']}/api/v1/task"
    answers: list[dict[str, Any]] = []
    for _ in range(2):
        async with house.session.post(url, json=text_body(), headers=headers) as answer:
            answers.append(await answer.json())
    assert answers[0] == answers[1]
