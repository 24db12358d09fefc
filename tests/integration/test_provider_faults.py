"""Whatever a provider raises or yields, callers of every protocol get an error, and the server goes on."""

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
from pomelo.providers.base import CODES, Event, Job
from pomelo.providers.sandbox import Sandbox
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS, digest
from tests.tasks import TASK_BODIES, text_body

WORD = Event(text_delta=TextDelta(content="Hello"))
LAST = Event(
    text_delta=TextDelta(
        finish_reason=FinishReason.FINISH_REASON_STOP,
        usage=TokenUsage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
    )
)
PROGRESS = Event(image_progress=ImageProgress(progress=0.5))
SOUND = Event(audio_chunk=AudioChunk(data=b"sound", content_type="audio/mpeg"))


class StrangeError(PomeloError):
    """An error whose message is no text."""

    def __init__(self) -> None:
        super().__init__("provider_failed")
        self.message = b"bytes"  # type: ignore[assignment]


class IncompleteError(PomeloError):
    """An error that lacks what every PomeloError has."""

    def __init__(self) -> None:
        pass


class RowlessError(PomeloError):
    """An error without a row of the table."""

    def __init__(self) -> None:
        super().__init__("provider_failed")
        self.row = None  # type: ignore[assignment]


class CodelessError(PomeloError):
    """An error whose code can't be read."""

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
    "a field that is no text": lambda: PomeloError("invalid_parameter", field=7),  # type: ignore[arg-type]
    **{code: partial(PomeloError, code) for code in sorted(TABLE.keys() - CODES)},
}

YIELDED: dict[str, tuple[Any, ...]] = {
    "None": (WORD, None, LAST),
    "text": ("Hello", LAST),
    "a dict": ({"text_delta": {"content": "Hello"}}, LAST),
    "an empty event": (WORD, Event(), LAST),
    "audio": (WORD, SOUND, LAST),
    "progress of an image": (PROGRESS, LAST),
    "a result": (WORD, Event(result=TaskResult()), LAST),
    "an event after the last": (WORD, LAST, WORD),
    "two last events": (WORD, LAST, LAST),
    "an unknown finish_reason": (WORD, Event(text_delta=TextDelta(finish_reason=77))),  # type: ignore[arg-type]
    "nothing": (),
    "no last event": (WORD,),
}

RESULTS: dict[str, list[tuple[Any, ...]]] = {
    "image": [(PROGRESS, WORD), (SOUND,), (Event(result=TaskResult()),), (None,)],
    "tts": [
        (Event(audio_chunk=AudioChunk(data=b"sound")),),
        (SOUND, WORD),
        (SOUND, None),
        (LAST,),
        (Event(result=TaskResult()),),
    ],
    "stt": [(WORD,), (SOUND,), (Event(result=TaskResult()),), (None,)],
}


class Rogue:
    """A provider that does what `act` says."""

    configured = True
    act: Callable[[Job], Any]

    def __init__(self) -> None:
        self.text = self.image = self.text_to_speech = self.speech_to_text = self._act

    def _act(self, job: Job) -> Any:
        return self.act(job)

    async def aclose(self) -> None:
        """See Provider."""


ROGUE = Rogue()


def yielding(*events: Any, then: Callable[[], BaseException] | None = None) -> Callable[[Job], Any]:
    """What yields these events and then raises."""

    async def act(job: Job) -> AsyncIterator[Any]:
        for event in events:
            yield event
        if then is not None:
            raise then()

    return act


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    """A server whose vendors are all the rogue provider."""
    providers = dict.fromkeys(("openai", "bfl", "elevenlabs"), ROGUE)
    folder: Path = tmp_path_factory.mktemp("rogue")
    async with run_app(folder, providers={"sandbox": Sandbox(), **providers}) as opened:
        yield opened


async def check(
    house: RunningApp,
    caplog: pytest.LogCaptureFixture,
    body: dict[str, Any],
    *,
    stream: bool,
    logged: bool = True,
) -> None:
    """Asks every way: provider_failed, one line in the log, nothing charged or held."""
    for way in PROTOCOLS:
        caller = await house.account()
        caplog.clear()
        request_id = f"id-{way}"
        async with asyncio.timeout(10):
            told = await house.ask(
                way, caller.live, body, stream=stream, headers={"X-Request-Id": request_id}
            )
        assert (told.code, told.done) == ("provider_failed", False), (way, told)
        assert "secret" not in told.message
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert len(lines) == logged, (way, lines)
        assert all(f"request {request_id}: the provider " in line for line in lines)
        assert "secret" not in caplog.text
        for _ in range(100):
            if not await house.concurrency(caller, live=True):
                break
            await asyncio.sleep(0.01)
        assert (await house.balance(caller, live=True)).held == 0
        if not stream:
            assert await house.records(caller) == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("begun", [(), (WORD,)], ids=["before", "after"])
@pytest.mark.parametrize("raised", RAISED)
async def test_what_a_provider_may_not_raise_is_provider_failed_and_logged(
    house: RunningApp, caplog: pytest.LogCaptureFixture, raised: str, begun: tuple[Event, ...], stream: bool
) -> None:
    ROGUE.act = yielding(*begun, then=RAISED[raised])
    await check(house, caplog, text_body(), stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("yielded", YIELDED)
async def test_what_a_provider_may_not_yield_is_provider_failed_and_logged(
    house: RunningApp, caplog: pytest.LogCaptureFixture, yielded: str, stream: bool
) -> None:
    ROGUE.act = yielding(*YIELDED[yielded])
    # That an answer has no end is known to the task type, which knows no fault of the provider's code.
    await check(house, caplog, text_body(), stream=stream, logged=yielded not in ("nothing", "no last event"))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", RESULTS)
async def test_events_of_another_task_type_are_provider_failed(
    house: RunningApp, caplog: pytest.LogCaptureFixture, kind: str, stream: bool
) -> None:
    for events in RESULTS[kind]:
        ROGUE.act = yielding(*events)
        await check(house, caplog, TASK_BODIES[kind], stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_method_that_fails_when_it_is_called_or_is_no_generator_is_provider_failed(
    house: RunningApp, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    def exits(job: Job) -> None:
        raise SystemExit(3)

    for act in (exits, lambda job: None, lambda job: [WORD, LAST]):
        ROGUE.act = act
        await check(house, caplog, text_body(), stream=stream)


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_what_a_provider_raises_while_it_is_closed_is_logged_and_changes_nothing(
    house: RunningApp, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    async def act(job: Job) -> AsyncIterator[Any]:
        try:
            yield WORD
            yield None
        finally:
            raise SystemExit(3)

    ROGUE.act = act
    caller = await house.account()
    told = await house.ask(way, caller.live, text_body(), stream=True)
    assert told.code == "provider_failed"
    assert "failed unexpectedly while it was closed" in caplog.text
    ROGUE.act = yielding(WORD, LAST)
    told = await house.ask(way, caller.live, text_body(), stream=True)
    assert (told.code, told.content, told.done) == ("ok", "Hello", True)


@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize("code", sorted(CODES))
async def test_the_errors_that_a_provider_may_raise_reach_the_caller(
    house: RunningApp, way: str, code: str
) -> None:
    def failure() -> PomeloError:
        return PomeloError(code, "Said by the provider", retry_after=-1)

    ROGUE.act = yielding(then=failure)
    caller = await house.account()
    told = await house.ask(way, caller.live, text_body())
    assert (told.code, told.message) == (code, "Said by the provider")
    assert told.metadata.get("retry-after") in (None, "5")


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_a_call_that_its_caller_leaves_or_that_is_late_is_still_cancelled(
    house: RunningApp, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    ended = asyncio.Event()

    async def act(job: Job) -> AsyncIterator[Any]:
        try:
            await asyncio.sleep(60)
            yield LAST
        except asyncio.CancelledError:
            ended.set()
            raise

    ROGUE.act = act
    caller = await house.account()
    told = await house.ask(way, caller.live, text_body(), within=0.2)
    assert told.code == "deadline_exceeded"
    await asyncio.wait_for(ended.wait(), 5)
    ended.clear()
    asking = asyncio.create_task(house.ask(way, caller.live, text_body()))
    await asyncio.sleep(0.2)
    asking.cancel()
    await asyncio.wait_for(ended.wait(), 5)
    assert "the provider" not in caplog.text


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_an_error_with_an_empty_message_has_the_message_of_its_row(house: RunningApp, way: str) -> None:
    def failure() -> PomeloError:
        error = PomeloError("provider_unavailable")
        error.message = " "
        return error

    ROGUE.act = yielding(then=failure)
    told = await house.ask(way, (await house.account()).live, text_body())
    assert (told.code, told.message) == ("provider_unavailable", TABLE["provider_unavailable"].message)


async def wait_on() -> None:
    """Waits long."""
    await asyncio.sleep(60)


async def go_on() -> None:
    """Goes on in the same step."""


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("begun", [(), (WORD,)], ids=["before", "after"])
@pytest.mark.parametrize("then", [wait_on, go_on])
async def test_a_provider_that_cancels_its_own_task_is_provider_failed_and_logged(
    house: RunningApp, caplog: pytest.LogCaptureFixture, then: Any, begun: tuple[Event, ...], stream: bool
) -> None:
    async def act(job: Job) -> AsyncIterator[Any]:
        for event in begun:
            yield event
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await then()
        yield LAST

    ROGUE.act = act
    await check(house, caplog, text_body(), stream=stream)
    assert "cancelled the task that runs it" in caplog.text


async def test_a_method_that_cancels_the_task_when_it_is_called_is_provider_failed(
    house: RunningApp, caplog: pytest.LogCaptureFixture
) -> None:
    def act(job: Job) -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return yielding(WORD, LAST)(job)

    ROGUE.act = act
    for stream in (False, True):
        await check(house, caplog, text_body(), stream=stream)


@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_provider_that_cancels_its_task_later_fails_its_task_alone(
    house: RunningApp, caplog: pytest.LogCaptureFixture, stream: bool, way: str
) -> None:
    async def act(job: Job) -> AsyncIterator[Any]:
        if way == "grpc":
            yield WORD
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.05, task.cancel)
        await asyncio.sleep(60)
        yield LAST

    ROGUE.act = act
    caller = await house.account()
    async with asyncio.timeout(10):
        told = await house.ask(way, caller.live, text_body(), stream=stream)
        assert told.code == "internal_error"
        assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
        ROGUE.act = yielding(WORD, LAST)
        told = await house.ask(way, caller.live, text_body(), stream=stream)
    assert (told.code, told.content) == ("ok", "Hello")


async def swallow() -> None:
    """Ignores every cancellation."""
    for _ in range(300):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)


async def linger() -> None:
    """Waits while it is cancelled."""
    try:
        await asyncio.sleep(30)
    finally:
        await asyncio.sleep(30)


@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize("act_on", [swallow, linger])
async def test_a_provider_that_ignores_a_cancellation_delays_its_caller_a_second_at_most(
    house: RunningApp, caplog: pytest.LogCaptureFixture, act_on: Any, way: str
) -> None:
    async def act(job: Job) -> AsyncIterator[Any]:
        await act_on()
        yield LAST

    ROGUE.act = act
    caller = await house.account()
    begin = asyncio.get_running_loop().time()
    told = await house.ask(way, caller.live, text_body(), within=0.5)
    assert told.code == "deadline_exceeded"
    assert asyncio.get_running_loop().time() - begin < 3
    for _ in range(300):
        if not await house.concurrency(caller, live=True):
            break
        await asyncio.sleep(0.01)
    assert (await house.balance(caller, live=True)).held == 0
    # Over gRPC the client's own cancellation follows, which ends the second wait.
    if act_on is swallow or way == "rest":
        assert "went on after it was cancelled, and was stopped" in caplog.text


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_a_provider_that_waits_while_it_is_closed_delays_its_caller_a_second_at_most(
    house: RunningApp, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    async def act(job: Job) -> AsyncIterator[Any]:
        try:
            yield WORD
            yield None
        finally:
            await asyncio.sleep(30)

    ROGUE.act = act
    caller = await house.account()
    async with asyncio.timeout(3):
        told = await house.ask(way, caller.live, text_body(), stream=True)
    assert told.code == "provider_failed"
    assert "went on after it was closed, and was stopped" in caplog.text


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_a_provider_may_use_timeouts_and_task_groups_of_its_own(
    house: RunningApp, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    async def fail() -> None:
        raise ValueError

    async def act(job: Job) -> AsyncIterator[Any]:
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

    ROGUE.act = act
    told = await house.ask(way, (await house.account()).live, text_body(), stream=True)
    assert (told.code, told.content, told.done) == ("ok", "Hello", True)
    assert "the provider" not in caplog.text


CONTENT_TYPES = ["text/html", "audio/mpeg\r\nX-Injected: 1", "audio/mpeg\n", "image/png", "audio/", "audio/é"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("content_type", CONTENT_TYPES)
async def test_a_content_type_that_is_no_media_type_is_provider_failed(
    house: RunningApp, caplog: pytest.LogCaptureFixture, content_type: str, stream: bool
) -> None:
    ROGUE.act = yielding(Event(audio_chunk=AudioChunk(data=b"sound", content_type=content_type)))
    await check(house, caplog, TASK_BODIES["tts"], stream=stream)
    picture = GeneratedImage(data=b"\x89PNG", content_type=content_type.replace("image", "audio"))
    ROGUE.act = yielding(Event(result=TaskResult(image=ImageOutput(images=[picture]))))
    await check(house, caplog, TASK_BODIES["image"], stream=stream)


@pytest.mark.parametrize("way", ["rest", "remote"])
async def test_empty_audio_is_an_error_and_not_the_beginning_of_raw_audio(
    house: RunningApp, way: str
) -> None:
    empty = Event(audio_chunk=AudioChunk(content_type="audio/ogg"))
    caller = await house.account()
    headers = {"Authorization": f"Bearer {caller.live}", "Accept": "audio/*"}

    async def ask() -> tuple[int, str, bytes]:
        url = f"{house.urls[way]}/api/v1/task"
        async with house.session.post(url, json=TASK_BODIES["tts"], headers=headers) as answer:
            return answer.status, answer.content_type, await answer.read()

    ROGUE.act = yielding(empty)
    status, content_type, body = await ask()
    assert (status, content_type) == (502, "application/json")
    assert b"provider_failed" in body
    ROGUE.act = yielding(empty, Event(audio_chunk=AudioChunk(data=b"sound")))
    assert await ask() == (200, "audio/ogg", b"sound")


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_large_pieces_of_a_provider_are_cut_for_every_client(house: RunningApp, way: str) -> None:
    sound = bytes(range(256)) * 24_000
    ROGUE.act = yielding(Event(audio_chunk=AudioChunk(data=sound, content_type="audio/mpeg")))
    caller = await house.account()
    told = await house.ask(way, caller.live, TASK_BODIES["tts"], stream=True)
    assert (told.code, told.content, told.done) == ("ok", digest(sound), True)
    text = "\u0001é語🍊\u2028" * 120_000
    last = Event()
    last.CopyFrom(LAST)
    last.text_delta.content = text
    ROGUE.act = yielding(WORD, Event(text_delta=TextDelta(content=text)), last)
    if way != "grpc":
        headers = {"Authorization": f"Bearer {caller.live}"}
        body = text_body() | {"stream": True}
        url = f"{house.urls[way]}/api/v1/task"
        async with house.session.post(url, json=body, headers=headers) as answer:
            lines = [line async for line in answer.content]  # aiohttp refuses a long line
        assert max(map(len, lines)) < 64 * 1024
    told = await house.ask(way, caller.live, text_body(), stream=True)
    assert (told.code, told.done) == ("ok", True)
    assert told.content == "Hello" + text + text


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_the_total_of_tokens_is_the_sum_of_its_parts(house: RunningApp, way: str) -> None:
    usage = TokenUsage(prompt_tokens=3, completion_tokens=4, total_tokens=-9)
    last = Event(text_delta=TextDelta(finish_reason=FinishReason.FINISH_REASON_STOP, usage=usage))
    ROGUE.act = yielding(WORD, last)
    caller = await house.account()
    for stream in (False, True):
        told = await house.ask(way, caller.live, text_body(), stream=stream)
        assert told.usage[:3] == (3, 4, 7)


class Misfit(Rogue):
    """A provider that fails while it fits an input."""

    def __init__(self) -> None:
        super().__init__()
        self.fit_text = self._fit
        self.raises: Callable[[], BaseException] = ValueError

    def _fit(self, fitting: Any) -> None:
        raise self.raises()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("raised", ["SystemExit", "ValueError", "CancelledError", "invalid_api_key"])
async def test_a_provider_that_can_not_fit_an_input_is_provider_failed_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, raised: str, stream: bool
) -> None:
    misfit = Misfit()
    misfit.raises = RAISED[raised]
    async with run_app(tmp_path, providers={"sandbox": Sandbox(), "openai": misfit}) as house:
        for way in PROTOCOLS:
            caller = await house.account()
            caplog.clear()
            told = await house.ask(way, caller.live, text_body(), stream=stream)
            assert told.code == "provider_failed", way
            assert caplog.text.count("the provider openai failed to fit an input") == 1
            assert "secret words" not in told.message
            assert (await house.balance(caller, live=True)).held == 0
