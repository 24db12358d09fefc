"""Providers that raise or yield anything invalid: callers get an error over every protocol, and the server goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageOutput, ImageProgress
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, Role, TextDelta, TextOutput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event, Job
from pomelo.providers.errors import CODES
from pomelo.providers.sandbox import Sandbox
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOL, PROTOCOLS, REST_PROTOCOL, STREAM, digest
from tests.integration.faulty_provider import (
    FAULTY,
    LAST,
    WORD,
    FaultyProvider,
    ask,
    check,
    faulty_app,
    yielding,
)
from tests.tasks import TASK_BODIES, text_body

PROGRESS = Event(image_progress=ImageProgress(progress=0.5))
CHUNK = Event(audio_chunk=AudioChunk(data=b"audio", content_type="audio/mpeg"))


app = faulty_app()


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
    "a dict": ({"text_delta": {"text": "Hello"}}, LAST),
    "an empty event": (WORD, Event(), LAST),
    "audio": (WORD, CHUNK, LAST),
    "progress of an image": (PROGRESS, LAST),
    "a result": (WORD, Event(completed=TaskResult()), LAST),
    "an event after the last": (WORD, LAST, WORD),
    "two last events": (WORD, LAST, LAST),
    "an unknown finish_reason": (WORD, Event(completed=TaskResult(text=TextOutput(finish_reason=77)))),  # type: ignore[arg-type]
    "nothing": (),
    "no last event": (WORD,),
}

RESULTS: dict[str, list[tuple[Any, ...]]] = {
    "image": [(PROGRESS, WORD), (CHUNK,), (Event(completed=TaskResult()),), (None,)],
    "tts": [
        (Event(audio_chunk=AudioChunk(data=b"audio")),),
        (CHUNK, WORD),
        (CHUNK, None),
        (LAST,),
        (Event(completed=TaskResult()),),
    ],
    "stt": [(WORD,), (CHUNK,), (Event(completed=TaskResult()),), (None,)],
}


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
@pytest.mark.parametrize("code", sorted(CODES))
async def test_documented_errors_of_a_provider_reach_the_caller(
    app: RunningApp, protocol: str, code: str
) -> None:
    def failure() -> PomeloError:
        return PomeloError(code, "Message of the provider", retry_after=-1)

    FAULTY.act = yielding(then=failure)
    outcome = await ask(app, protocol)
    assert (outcome.code, outcome.message) == (code, "Message of the provider")
    assert outcome.metadata.get("retry-after") in (None, "5")


@PROTOCOL
async def test_an_error_with_an_empty_message_gets_the_default_message(
    app: RunningApp, protocol: str
) -> None:
    FAULTY.act = yielding(then=lambda: PomeloError("provider_unavailable", " "))
    outcome = await ask(app, protocol)
    assert (outcome.code, outcome.message) == ("provider_unavailable", TABLE["provider_unavailable"].message)


CONTENT_TYPES = ["text/html", "audio/mpeg\r\nX-Injected: 1", "audio/mpeg\n", "image/png", "audio/", "audio/é"]


@STREAM
@pytest.mark.parametrize("content_type", CONTENT_TYPES)
async def test_an_invalid_content_type_is_provider_failed(
    app: RunningApp, caplog: pytest.LogCaptureFixture, content_type: str, stream: bool
) -> None:
    FAULTY.act = yielding(Event(audio_chunk=AudioChunk(data=b"audio", content_type=content_type)))
    await check(app, caplog, TASK_BODIES["tts"], stream=stream)
    image = GeneratedImage(data=b"\x89PNG", content_type=content_type.replace("image", "audio"))
    FAULTY.act = yielding(Event(completed=TaskResult(image=ImageOutput(images=[image]))))
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
    last.completed.text.message.role = Role.ROLE_ASSISTANT
    last.completed.text.message.content.add(text=text)
    FAULTY.act = yielding(WORD, Event(text_delta=TextDelta(text=text)), last)
    if protocol != "grpc":
        lines = await app.lines(protocol, account.live, text_body())
        assert max(map(len, lines)) < 64 * 1024
    outcome = await app.ask(protocol, account.live, text_body(), stream=True)
    assert (outcome.code, outcome.done) == ("ok", True)
    assert outcome.content == "Hello" + text + text


@PROTOCOL
async def test_the_total_of_tokens_is_always_the_sum(app: RunningApp, protocol: str) -> None:
    text = TextOutput(finish_reason=FinishReason.FINISH_REASON_STOP)
    usage = Usage(input_tokens=3, output_tokens=4)
    FAULTY.act = yielding(WORD, Event(completed=TaskResult(text=text, usage=usage)))
    for stream in (False, True):
        outcome = await ask(app, protocol, stream=stream)
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
