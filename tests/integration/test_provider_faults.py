"""Providers that raise or yield anything invalid: callers get an error over every protocol, and the server goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageOutput, ImageProgress
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, TokenUsage
from pomelo.providers.base import Event, Job
from pomelo.providers.errors import CODES
from pomelo.providers.sandbox import Sandbox
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, PROTOCOLS, REST_PROTOCOL, STREAM, digest
from tests.tasks import TASK_BODIES, text_body

WORD = Event(text_delta=TextDelta(content="Hello"))
LAST = Event(
    text_delta=TextDelta(
        finish_reason=FinishReason.FINISH_REASON_STOP,
        usage=TokenUsage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
    )
)
PROGRESS = Event(image_progress=ImageProgress(progress=0.5))
CHUNK = Event(audio_chunk=AudioChunk(data=b"audio", content_type="audio/mpeg"))


class StrangeError(PomeloError):
    def __init__(self) -> None:
        super().__init__("provider_failed")
        self.message = b"bytes"  # type: ignore[misc, assignment]


class IncompleteError(PomeloError):
    def __init__(self) -> None:
        pass


class RowlessError(PomeloError):
    def __init__(self) -> None:
        super().__init__("provider_failed")
        self.row = None  # type: ignore[misc, assignment]


class CodelessError(PomeloError):
    @property
    def code(self) -> str:
        raise RuntimeError


RAISED: dict[str, Callable[[], BaseException]] = {
    "CancelledError": asyncio.CancelledError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
    "GeneratorExit": GeneratorExit,
    "TimeoutError": TimeoutError,
    "ConnectionResetError": ConnectionResetError,
    "ValueError": lambda: ValueError("secret words"),
    "an unknown code": lambda: PomeloError("no_such_code"),
    "a message of bytes": StrangeError,
    "an error without attributes": IncompleteError,
    "an error without a row": RowlessError,
    "an error without a code": partial(CodelessError, "provider_failed"),
    "a field that is a number": lambda: PomeloError("invalid_parameter", field=7),  # type: ignore[arg-type]
    **{code: partial(PomeloError, code) for code in sorted(TABLE.keys() - CODES)},
}

YIELDED: dict[str, tuple[Any, ...]] = {
    "None": (WORD, None, LAST),
    "text": ("Hello", LAST),
    "a dict": ({"text_delta": {"content": "Hello"}}, LAST),
    "an empty event": (WORD, Event(), LAST),
    "audio": (WORD, CHUNK, LAST),
    "progress of an image": (PROGRESS, LAST),
    "a result": (WORD, Event(result=TaskResult()), LAST),
    "an event after the last": (WORD, LAST, WORD),
    "two last events": (WORD, LAST, LAST),
    "an unknown finish_reason": (WORD, Event(text_delta=TextDelta(finish_reason=77))),  # type: ignore[arg-type]
    "nothing": (),
    "no last event": (WORD,),
}

RESULTS: dict[str, list[tuple[Any, ...]]] = {
    "image": [(PROGRESS, WORD), (CHUNK,), (Event(result=TaskResult()),), (None,)],
    "tts": [
        (Event(audio_chunk=AudioChunk(data=b"audio")),),
        (CHUNK, WORD),
        (CHUNK, None),
        (LAST,),
        (Event(result=TaskResult()),),
    ],
    "stt": [(WORD,), (CHUNK,), (Event(result=TaskResult()),), (None,)],
}


class FaultyProvider:
    """A provider whose task methods call `act`."""

    configured = True
    act: Callable[[Job[Any]], Any]

    def __init__(self) -> None:
        self.text = self.image = self.text_to_speech = self.speech_to_text = self._act

    def _act(self, job: Job[Any]) -> Any:
        return self.act(job)

    async def aclose(self) -> None:
        pass


FAULTY = FaultyProvider()


def yielding(*events: Any, then: Callable[[], BaseException] | None = None) -> Callable[[Job[Any]], Any]:
    """Returns a task method that yields the events and then raises."""

    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        for event in events:
            yield event
        if then is not None:
            raise then()

    return act


@pytest.fixture(scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    """An app with the faulty provider in place of every vendor."""
    providers = dict.fromkeys(("openai", "bfl", "elevenlabs"), FAULTY)
    folder: Path = tmp_path_factory.mktemp("faulty")
    async with run_app(folder, providers={"sandbox": Sandbox(), **providers}) as opened:
        yield opened


async def check(
    app: RunningApp,
    caplog: pytest.LogCaptureFixture,
    body: dict[str, Any],
    *,
    stream: bool,
    logged: bool = True,
) -> None:
    """Asserts that a task over every protocol ends in provider_failed, logs one line, and leaves no reservation."""
    for protocol in PROTOCOLS:
        account = await app.account()
        caplog.clear()
        request_id = f"id-{protocol}"
        async with asyncio.timeout(10):
            outcome = await app.ask(
                protocol, account.live, body, stream=stream, headers={"X-Request-Id": request_id}
            )
        assert (outcome.code, outcome.done) == ("provider_failed", False), (protocol, outcome)
        assert "secret" not in outcome.message
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert len(lines) == logged, (protocol, lines)
        assert all(f"request {request_id}: the provider " in line for line in lines)
        assert "secret" not in caplog.text
        await app.idle(account, live=True)
        assert (await app.balance(account, live=True)).held == 0
        if not stream:
            assert await app.records(account) == []


@STREAM
@pytest.mark.parametrize("begun", [(), (WORD,)], ids=["before", "after"])
@pytest.mark.parametrize("raised", RAISED)
async def test_an_unexpected_error_of_a_provider_is_provider_failed_and_logged(
    app: RunningApp, caplog: pytest.LogCaptureFixture, raised: str, begun: tuple[Event, ...], stream: bool
) -> None:
    FAULTY.act = yielding(*begun, then=RAISED[raised])
    await check(app, caplog, text_body(), stream=stream)


@STREAM
@pytest.mark.parametrize("yielded", YIELDED)
async def test_an_unexpected_event_of_a_provider_is_provider_failed_and_logged(
    app: RunningApp, caplog: pytest.LogCaptureFixture, yielded: str, stream: bool
) -> None:
    FAULTY.act = yielding(*YIELDED[yielded])
    # An answer without an end is found by the task type's collector, which logs no fault of the provider.
    await check(app, caplog, text_body(), stream=stream, logged=yielded not in ("nothing", "no last event"))


@STREAM
@pytest.mark.parametrize("task_type", RESULTS)
async def test_events_of_another_task_type_are_provider_failed(
    app: RunningApp, caplog: pytest.LogCaptureFixture, task_type: str, stream: bool
) -> None:
    for events in RESULTS[task_type]:
        FAULTY.act = yielding(*events)
        await check(app, caplog, TASK_BODIES[task_type], stream=stream)


@STREAM
async def test_a_method_that_raises_or_returns_no_generator_is_provider_failed(
    app: RunningApp, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    def exits(job: Job[Any]) -> None:
        raise SystemExit(3)

    for act in (exits, lambda job: None, lambda job: [WORD, LAST]):
        FAULTY.act = act
        await check(app, caplog, text_body(), stream=stream)


@PROTOCOL
async def test_an_error_while_a_provider_is_closed_is_logged_and_changes_nothing(
    app: RunningApp, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        try:
            yield WORD
            yield None
        finally:
            raise SystemExit(3)

    FAULTY.act = act
    account = await app.account()
    outcome = await app.ask(protocol, account.live, text_body(), stream=True)
    assert outcome.code == "provider_failed"
    assert "failed unexpectedly while it was closed" in caplog.text
    FAULTY.act = yielding(WORD, LAST)
    outcome = await app.ask(protocol, account.live, text_body(), stream=True)
    assert (outcome.code, outcome.content, outcome.done) == ("ok", "Hello", True)


@PROTOCOL
@pytest.mark.parametrize("code", sorted(CODES))
async def test_documented_errors_of_a_provider_reach_the_caller(
    app: RunningApp, protocol: str, code: str
) -> None:
    def failure() -> PomeloError:
        return PomeloError(code, "Message of the provider", retry_after=-1)

    FAULTY.act = yielding(then=failure)
    account = await app.account()
    outcome = await app.ask(protocol, account.live, text_body())
    assert (outcome.code, outcome.message) == (code, "Message of the provider")
    assert outcome.metadata.get("retry-after") in (None, "5")


@PROTOCOL
async def test_a_call_is_cancelled_when_its_caller_leaves_or_its_deadline_passes(
    app: RunningApp, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        started.set()
        try:
            await asyncio.sleep(60)
            yield LAST
        except asyncio.CancelledError:
            cancelled.set()
            raise

    FAULTY.act = act
    account = await app.account()
    outcome = await app.ask(protocol, account.live, text_body(), within=0.2)
    assert outcome.code == "deadline_exceeded"
    await asyncio.wait_for(cancelled.wait(), 5)
    started.clear()
    cancelled.clear()
    task = asyncio.create_task(app.ask(protocol, account.live, text_body()))
    await asyncio.wait_for(started.wait(), 5)
    task.cancel()
    await asyncio.wait_for(cancelled.wait(), 5)
    assert "the provider" not in caplog.text


@PROTOCOL
async def test_an_error_with_an_empty_message_gets_the_default_message(
    app: RunningApp, protocol: str
) -> None:
    FAULTY.act = yielding(then=lambda: PomeloError("provider_unavailable", " "))
    outcome = await app.ask(protocol, (await app.account()).live, text_body())
    assert (outcome.code, outcome.message) == ("provider_unavailable", TABLE["provider_unavailable"].message)


async def keep_waiting() -> None:
    await asyncio.sleep(60)


async def continue_immediately() -> None:
    pass


@STREAM
@pytest.mark.parametrize("begun", [(), (WORD,)], ids=["before", "after"])
@pytest.mark.parametrize("then", [keep_waiting, continue_immediately])
async def test_a_provider_that_cancels_its_own_task_is_provider_failed_and_logged(
    app: RunningApp, caplog: pytest.LogCaptureFixture, then: Any, begun: tuple[Event, ...], stream: bool
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        for event in begun:
            yield event
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await then()
        yield LAST

    FAULTY.act = act
    await check(app, caplog, text_body(), stream=stream)
    assert "cancelled the task that runs it" in caplog.text


async def test_a_method_that_cancels_its_task_when_called_is_provider_failed(
    app: RunningApp, caplog: pytest.LogCaptureFixture
) -> None:
    def act(job: Job[Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return yielding(WORD, LAST)(job)

    FAULTY.act = act
    for stream in (False, True):
        await check(app, caplog, text_body(), stream=stream)


@PROTOCOL_AND_STREAM
async def test_a_provider_that_cancels_its_task_later_fails_only_that_task(
    app: RunningApp, caplog: pytest.LogCaptureFixture, stream: bool, protocol: str
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        if protocol == "grpc":
            yield WORD
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.05, task.cancel)
        await asyncio.sleep(60)
        yield LAST

    FAULTY.act = act
    account = await app.account()
    async with asyncio.timeout(10):
        outcome = await app.ask(protocol, account.live, text_body(), stream=stream)
        assert outcome.code == "internal_error"
        assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
        FAULTY.act = yielding(WORD, LAST)
        outcome = await app.ask(protocol, account.live, text_body(), stream=stream)
    assert (outcome.code, outcome.content) == ("ok", "Hello")


async def swallow() -> None:
    """Ignores every cancellation."""
    for _ in range(300):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)


async def wait_when_cancelled() -> None:
    """Waits again when it is cancelled."""
    try:
        await asyncio.sleep(30)
    finally:
        await asyncio.sleep(30)


@PROTOCOL
@pytest.mark.parametrize("act_on", [swallow, wait_when_cancelled])
async def test_a_provider_that_ignores_cancellation_delays_its_caller_by_a_second_at_most(
    app: RunningApp, caplog: pytest.LogCaptureFixture, act_on: Any, protocol: str
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        await act_on()
        yield LAST

    FAULTY.act = act
    account = await app.account()
    start = asyncio.get_running_loop().time()
    outcome = await app.ask(protocol, account.live, text_body(), within=0.5)
    assert outcome.code == "deadline_exceeded"
    assert asyncio.get_running_loop().time() - start < 3
    await app.idle(account, live=True)
    assert (await app.balance(account, live=True)).held == 0
    # Over gRPC the client then cancels the call, which ends the second wait.
    if act_on is swallow or protocol == "rest":
        assert "went on after it was cancelled, and was stopped" in caplog.text


@PROTOCOL
async def test_a_provider_that_waits_while_closing_delays_its_caller_by_a_second_at_most(
    app: RunningApp, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        try:
            yield WORD
            yield None
        finally:
            await asyncio.sleep(30)

    FAULTY.act = act
    account = await app.account()
    async with asyncio.timeout(3):
        outcome = await app.ask(protocol, account.live, text_body(), stream=True)
    assert outcome.code == "provider_failed"
    assert "went on after it was closed, and was stopped" in caplog.text


@PROTOCOL
async def test_a_provider_can_use_its_own_timeouts_and_task_groups(
    app: RunningApp, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async def fail() -> None:
        raise ValueError

    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        try:
            async with asyncio.timeout(0.05):
                await asyncio.sleep(60)
        except TimeoutError:
            yield WORD
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                await asyncio.sleep(60)
        except* ValueError:
            await asyncio.sleep(1.2)
        yield LAST

    FAULTY.act = act
    outcome = await app.ask(protocol, (await app.account()).live, text_body(), stream=True)
    assert (outcome.code, outcome.content, outcome.done) == ("ok", "Hello", True)
    assert "the provider" not in caplog.text


CONTENT_TYPES = ["text/html", "audio/mpeg\r\nX-Injected: 1", "audio/mpeg\n", "image/png", "audio/", "audio/é"]


@STREAM
@pytest.mark.parametrize("content_type", CONTENT_TYPES)
async def test_an_invalid_content_type_is_provider_failed(
    app: RunningApp, caplog: pytest.LogCaptureFixture, content_type: str, stream: bool
) -> None:
    FAULTY.act = yielding(Event(audio_chunk=AudioChunk(data=b"audio", content_type=content_type)))
    await check(app, caplog, TASK_BODIES["tts"], stream=stream)
    image = GeneratedImage(data=b"\x89PNG", content_type=content_type.replace("image", "audio"))
    FAULTY.act = yielding(Event(result=TaskResult(image=ImageOutput(images=[image]))))
    await check(app, caplog, TASK_BODIES["image"], stream=stream)


@REST_PROTOCOL
async def test_empty_audio_is_an_error_and_starts_no_raw_answer(app: RunningApp, protocol: str) -> None:
    empty = Event(audio_chunk=AudioChunk(content_type="audio/ogg"))
    account = await app.account()

    async def ask() -> tuple[int, str, bytes]:
        headers = {"Accept": "audio/*"}
        answer = await app.post(protocol, account.live, json=TASK_BODIES["tts"], headers=headers)
        return answer.status, answer.content_type, await answer.read()

    FAULTY.act = yielding(empty)
    status, content_type, body = await ask()
    assert (status, content_type) == (502, "application/json")
    assert b"provider_failed" in body
    FAULTY.act = yielding(empty, Event(audio_chunk=AudioChunk(data=b"audio")))
    assert await ask() == (200, "audio/ogg", b"audio")


@PROTOCOL
async def test_large_events_of_a_provider_are_split_for_every_protocol(
    app: RunningApp, protocol: str
) -> None:
    audio = bytes(range(256)) * 24_000
    FAULTY.act = yielding(Event(audio_chunk=AudioChunk(data=audio, content_type="audio/mpeg")))
    account = await app.account()
    outcome = await app.ask(protocol, account.live, TASK_BODIES["tts"], stream=True)
    assert (outcome.code, outcome.content, outcome.done) == ("ok", digest(audio), True)
    text = "\u0001é語🍊\u2028" * 120_000
    last = Event()
    last.CopyFrom(LAST)
    last.text_delta.content = text
    FAULTY.act = yielding(WORD, Event(text_delta=TextDelta(content=text)), last)
    if protocol != "grpc":
        lines = await app.lines(protocol, account.live, text_body())
        assert max(map(len, lines)) < 64 * 1024
    outcome = await app.ask(protocol, account.live, text_body(), stream=True)
    assert (outcome.code, outcome.done) == ("ok", True)
    assert outcome.content == "Hello" + text + text


@PROTOCOL
async def test_the_total_of_tokens_is_always_the_sum(app: RunningApp, protocol: str) -> None:
    usage = TokenUsage(prompt_tokens=3, completion_tokens=4, total_tokens=-9)
    last = Event(text_delta=TextDelta(finish_reason=FinishReason.FINISH_REASON_STOP, usage=usage))
    FAULTY.act = yielding(WORD, last)
    account = await app.account()
    for stream in (False, True):
        outcome = await app.ask(protocol, account.live, text_body(), stream=stream)
        assert outcome.usage[:3] == (3, 4, 7)


class UnfitProvider(FaultyProvider):
    """A provider that raises when it fits an input."""

    def __init__(self) -> None:
        super().__init__()
        self.fit_text = self._fit
        self.raises: Callable[[], BaseException] = ValueError

    def _fit(self, fitting: Any) -> None:
        raise self.raises()


@STREAM
@pytest.mark.parametrize("raised", ["SystemExit", "ValueError", "CancelledError", "invalid_api_key"])
async def test_an_error_while_a_provider_fits_an_input_is_provider_failed_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, raised: str, stream: bool
) -> None:
    unfit = UnfitProvider()
    unfit.raises = RAISED[raised]
    async with run_app(tmp_path, providers={"sandbox": Sandbox(), "openai": unfit}) as app:
        for protocol in PROTOCOLS:
            account = await app.account()
            caplog.clear()
            outcome = await app.ask(protocol, account.live, text_body(), stream=stream)
            assert outcome.code == "provider_failed", protocol
            assert caplog.text.count("the provider openai failed to fit an input") == 1
            assert "secret words" not in outcome.message
            assert (await app.balance(account, live=True)).held == 0
