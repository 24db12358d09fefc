"""The sandbox provider: yields replies, images, speech and transcripts as events.

CPU-bound work runs in small steps in threads of its own: it doesn't block the event loop, stops when it is
closed, and takes no thread that live tasks need.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from pomelo.audio_formats import AudioFormat
from pomelo.errors import PomeloError
from pomelo.fields import DEFAULT_IMAGE_SIDE
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageOutput, ImageProgress
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, ToolCall
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import AudioSource, Event, Job
from pomelo.providers.images import FORMATS
from pomelo.providers.sandbox import text, tools
from pomelo.providers.sandbox.image import draw
from pomelo.providers.sandbox.recognition import Recognition, recognize, speech_seconds, transcribe
from pomelo.providers.sandbox.speech import Speech
from pomelo.providers.sandbox.triggers import Triggers, failure, parse
from pomelo.providers.text import completed_text

_LARGE = 64 * 1024
"""Bytes of an input above which its words are counted in a thread."""

_THREADS = 2

_Step = TypeVar("_Step")


class _Reply(NamedTuple):
    """The answer to a text job: a text, or tool calls."""

    text: str
    calls: list[ToolCall]
    finish: FinishReason.ValueType
    usage: Usage


class Sandbox:
    """Answers every task type; the same job always gives the same answer.

    `sleep` waits for the seconds of a trigger, and yields to other tasks between words; `now` returns Unix
    time in seconds, for the message of a provoked rate limit.
    """

    configured = True

    def __init__(
        self,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._sleep = sleep
        self._now = now
        self._threads = ThreadPoolExecutor(_THREADS, "sandbox")

    async def aclose(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Replies to the user's last message, or calls tools, word by word in a stream.

        Raises:
            PomeloError: context_length_exceeded; the error of a trigger.
        """
        if not job.stream:
            yield await self.complete_text(job)
            return
        triggers, reply = await self._reply(job)
        count = reply.usage.output_tokens
        pieces = tools.pieces(reply.calls) if reply.calls else text.pieces(reply.text)
        for event in islice(pieces, count // 2 if triggers.stops_halfway else count):
            yield event
            await self._sleep(triggers.pace)
        if triggers.stops_halfway:
            await self._stop_halfway(triggers)
        yield completed_text("", reply.finish, reply.usage)

    async def complete_text(self, job: Job[Any]) -> Event:
        """As `text`, without a stream."""
        triggers, reply = await self._reply(job)
        if triggers.stops_halfway:
            await self._stop_halfway(triggers)
        return completed_text(reply.text, reply.finish, reply.usage, reply.calls)

    async def _reply(self, job: Job[Any]) -> tuple[Triggers, _Reply]:
        given, model = job.input, job.model
        loop = asyncio.get_running_loop()
        if given.ByteSize() > _LARGE:
            prompt = await loop.run_in_executor(self._threads, text.read_prompt, given)
        else:
            prompt = text.read_prompt(given)
        text.check_length(prompt.tokens, model.limits.max_input_tokens)
        triggers = await self._begin(prompt.text, job, "messages")
        if given.tools or given.HasField("format"):  # an example of a schema takes time
            return triggers, await loop.run_in_executor(self._threads, _answer, job, prompt, triggers)
        return triggers, _answer(job, prompt, triggers)

    async def image(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Draws an image that depends on prompt, seed and model.

        Raises:
            PomeloError: provider_not_configured, the format needs PyAV; the error of a trigger.
        """
        given = job.input
        triggers = await self._begin(given.prompt, job, "prompt")
        file_format = FORMATS[given.output_format]
        steps = draw(
            f"{job.model.name}\n{_seed(job)}\n{given.prompt}",
            given.width or DEFAULT_IMAGE_SIDE,
            given.height or DEFAULT_IMAGE_SIDE,
            file_format,
        )
        async with aclosing(self._in_thread(steps)) as progress:
            async for step in progress:
                if triggers.pace and step:
                    await self._sleep(triggers.pace)
                done = 1 if isinstance(step, bytes) else step
                if job.stream:
                    yield Event(image_progress=ImageProgress(progress=done))
                if triggers.stops_halfway and done >= 0.5:
                    await self._stop_halfway(triggers)
                if isinstance(step, bytes):
                    image = GeneratedImage(data=step, content_type=f"image/{file_format}")
                    yield Event(completed=TaskResult(image=ImageOutput(images=[image])))

    def text_to_speech(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Generates speech that contains the text, 60 ms a character at speed 1.

        Raises:
            PomeloError: provider_not_configured, the format needs PyAV; the error of a trigger.
        """
        content = job.input.text
        return self._speak(job, content, speech_seconds(content, _speed(job)), "text")

    async def speech_to_speech(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Generates speech of the recognized text, at speed 1 as long as the input.

        Raises:
            PomeloError: invalid_parameter, the audio is empty or too long; store_unavailable;
                provider_not_configured, the format needs PyAV; the error of a trigger.
        """
        recognized = await self._recognize(job)
        seconds = recognized.seconds / _speed(job)
        async with aclosing(self._speak(job, recognized.text, seconds, "audio")) as events:
            async for event in events:
                yield event

    async def speech_to_text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Transcribes audio that the sandbox made; invents a transcript of any other.

        Raises:
            PomeloError: invalid_parameter, the audio is empty or too long; store_unavailable; the error of a
                trigger.
        """
        recognized = await self._recognize(job)
        triggers = await self._begin(recognized.text, job, "audio")
        if triggers.stops_halfway:
            await self._stop_halfway(triggers)
        transcription = await asyncio.get_running_loop().run_in_executor(
            self._threads, transcribe, recognized.text, recognized.seconds, job.input
        )
        yield Event(completed=TaskResult(transcription=transcription))

    async def _begin(self, content: str, job: Job[Any], field: str) -> Triggers:
        """Runs the triggers of `content` that come before an answer, and returns all of them.

        Raises:
            PomeloError: of `[[error:CODE]]`.
        """
        triggers = parse(content)
        if triggers.delay:
            await self._sleep(triggers.delay)
        if triggers.error:
            raise failure(triggers.error, field=field, model=job.model.name, now=self._now())
        return triggers

    async def _stop_halfway(self, triggers: Triggers) -> None:
        """Fails, for `[[cut]]`, or waits until it is cancelled, for `[[stall]]`.

        Raises:
            PomeloError: provider_failed, for `[[cut]]`.
        """
        if triggers.cut:
            raise PomeloError("provider_failed")
        await asyncio.get_running_loop().create_future()

    async def _speak(
        self, job: Job[Any], content: str, seconds: float, field: str
    ) -> AsyncGenerator[Event, None]:
        triggers = await self._begin(content, job, field)
        # All that the tones of a word depend on.
        voice = f"{job.input.voice.lower()}\n{_seed(job)}\n{job.model.name}"
        speech = Speech(AudioFormat.of(job.input.output_format), content, voice, seconds)
        content_type = speech.format.content_type
        async with aclosing(self._in_thread(speech.chunks(half=triggers.stops_halfway))) as chunks:
            async for chunk in chunks:
                yield Event(audio_chunk=AudioChunk(data=chunk, content_type=content_type))
                content_type = ""
                if triggers.pace:
                    await self._sleep(triggers.pace)
        if triggers.stops_halfway:
            await self._stop_halfway(triggers)

    async def _in_thread(self, steps: Iterator[_Step]) -> AsyncGenerator[_Step, None]:
        """Runs each step of an iterator in a thread; closed early, it runs no further step."""
        loop = asyncio.get_running_loop()
        while (step := await loop.run_in_executor(self._threads, next, steps, None)) is not None:
            yield step

    async def _recognize(self, job: Job[Any]) -> Recognition:
        audio = job.audio or AudioSource("", 0)
        limit = job.model.limits.max_audio_seconds
        return await asyncio.get_running_loop().run_in_executor(self._threads, recognize, audio, limit)


def _answer(job: Job[Any], prompt: text.Prompt, triggers: Triggers) -> _Reply:
    given, model = job.input, job.model
    limit = text.output_limit(given, model.limits.max_output_tokens)
    calls = tools.tool_calls(prompt, given, model.name, triggers.calls)
    usage = Usage(input_tokens=prompt.tokens)
    if not calls:
        content, finish = text.reply(prompt, given, model.name, triggers.words, limit)
        usage.output_tokens = text.count(content)
        return _Reply(content, [], finish, usage)
    finish = FinishReason.FINISH_REASON_TOOL_CALLS
    if limit and tools.count(calls) > limit:
        calls = list(tools.truncate(calls, limit))
        finish = FinishReason.FINISH_REASON_LENGTH
    usage.output_tokens = tools.count(calls)
    return _Reply("", calls, finish, usage)


def _seed(job: Job[Any]) -> str:
    return str(job.input.seed) if job.input.HasField("seed") else ""


def _speed(job: Job[Any]) -> float:
    settings = job.input.voice_settings
    return settings.speed if settings.HasField("speed") else 1.0
