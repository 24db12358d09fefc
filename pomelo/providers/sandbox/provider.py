"""The sandbox provider: walks the replies, pictures, sounds and transcripts of its neighbours as events.

The engine calls it, by the port of `pomelo.providers.base`, for the tasks of test keys. What takes real
work runs in worker threads of its own, slice by slice, so that the event loop goes on and closing stops it;
test tasks never block the threads that live tasks need.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from pomelo.catalog.catalog import SIDE
from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageFormat, ImageOutput, ImageProgress
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason
from pomelo.providers.base import AudioSource, Event, Job
from pomelo.providers.sandbox import text
from pomelo.providers.sandbox.hearing import Heard, listen, spoken_seconds
from pomelo.providers.sandbox.melody import CHARACTER_SECONDS
from pomelo.providers.sandbox.picture import CONTENT_TYPES, draw
from pomelo.providers.sandbox.sound import Sound
from pomelo.providers.sandbox.transcript import transcribe
from pomelo.providers.sandbox.triggers import NONE, Script, failure, find

_FORMATS = {
    ImageFormat.IMAGE_FORMAT_UNSPECIFIED: "png",
    ImageFormat.IMAGE_FORMAT_PNG: "png",
    ImageFormat.IMAGE_FORMAT_JPEG: "jpeg",
    ImageFormat.IMAGE_FORMAT_WEBP: "webp",
}

_THREADS = 2

_Step = TypeVar("_Step")


class Sandbox:
    """Answers every kind of task; the same job gives the same answer.

    `sleep` waits for the seconds that a trigger asks for, and lets others run between words; `now` is Unix
    time in seconds, for the message of a provoked rate limit alone.
    """

    def __init__(
        self,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._sleep = sleep
        self._now = now
        self._threads = ThreadPoolExecutor(_THREADS, "sandbox")

    @property
    def configured(self) -> bool:
        """Always: it needs nothing."""
        return True

    async def aclose(self) -> None:
        """Ends its threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Replies to the last message of a user, word by word when streamed.

        Raises:
            PomeloError: context_length_exceeded, and what a trigger asks for.
        """
        given = job.input
        limits = job.model.limits
        prompt, prompt_tokens = text.read(given.messages)
        text.check_length(prompt_tokens, limits.max_input_tokens)
        script = await self._begin(prompt, job, "messages")
        content, finish = text.reply(prompt, given, job.model.name, script.words, limits.max_output_tokens)
        if job.stream:
            words = content.split(" ") if content else []
            for index, word in enumerate(words[: len(words) // 2] if script.halves else words):
                # Filling a new event in place costs a third of building its parts first.
                event = Event()
                event.text_delta.content = " " + word if index else word
                yield event
                await self._sleep(script.pace)
            content = ""
            completion_tokens = len(words)
        else:
            completion_tokens = text.count(content)
        if script.halves:
            await self._break_off(script)
        yield _last_delta(content, finish, prompt_tokens, completion_tokens)

    async def image(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Draws a landscape that depends on prompt, seed and model.

        Raises:
            PomeloError: what a trigger asks for.
        """
        given = job.input
        script = await self._begin(given.prompt, job, "prompt")
        file_format = _FORMATS.get(given.output_format, "png")
        steps = draw(
            f"{job.model.name}\n{_seed(job)}\n{given.prompt}",
            given.width or SIDE,
            given.height or SIDE,
            file_format,
        )
        if job.stream:
            yield Event(image_progress=ImageProgress(progress=0))
        async with aclosing(self._in_thread(steps)) as drawn:
            async for step in drawn:
                if script.pace:
                    await self._sleep(script.pace)
                done = 1 if isinstance(step, bytes) else step
                if job.stream:
                    yield Event(image_progress=ImageProgress(progress=done))
                if script.halves and done >= 0.5:
                    await self._break_off(script)
                if isinstance(step, bytes):
                    picture = GeneratedImage(data=step, content_type=CONTENT_TYPES[file_format])
                    yield Event(result=TaskResult(image=ImageOutput(images=[picture])))

    async def text_to_speech(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Sings the text, 60 ms a character at speed 1, in the asked format; the sound bears the text.

        Raises:
            PomeloError: what a trigger asks for.
        """
        given = job.input
        script = await self._begin(given.text, job, "text")
        speed = given.voice_settings.speed if given.voice_settings.HasField("speed") else 1.0
        seconds = spoken_seconds(given.text, speed)
        sound = Sound.of(given.output_format, given.text, _tone(job), seconds, CHARACTER_SECONDS / speed)
        async with aclosing(self._play(sound, script)) as events:
            async for event in events:
                yield event

    async def speech_to_speech(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Sings what a sound says, in as much time at speed 1, in the asked voice and format.

        Raises:
            PomeloError: invalid_parameter for a sound that is empty or too long; store_unavailable; what a
                trigger asks for.
        """
        heard = await self._listen(job)
        script = await self._begin(heard.text, job, "audio")
        settings = job.input.voice_settings
        speed = settings.speed if settings.HasField("speed") else 1.0
        sound = Sound.of(job.input.output_format, heard.text, _tone(job), heard.seconds / speed)
        async with aclosing(self._play(sound, script)) as events:
            async for event in events:
                yield event

    async def speech_to_text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Writes down what a sound of the sandbox says; makes something up for any other.

        Raises:
            PomeloError: as speech_to_speech.
        """
        heard = await self._listen(job)
        script = await self._begin(heard.text, job, "audio")
        if script.halves:
            await self._break_off(script)
        yield Event(result=TaskResult(transcription=transcribe(heard.text, heard.seconds, job.input)))

    async def _begin(self, said: str, job: Job[Any], field: str) -> Script:
        """Does what the triggers of `said` ask for before an answer, and tells what they ask for later.

        Raises:
            PomeloError: of `[[error:CODE]]`.
        """
        if "[[" not in said:
            return NONE
        script = find(said)
        if script.delay:
            await self._sleep(script.delay)
        if script.error:
            raise failure(script.error, field=field, model=job.model.name, now=self._now())
        return script

    async def _break_off(self, script: Script) -> None:
        """Ends an answer half way.

        Raises:
            PomeloError: provider_failed, for `[[cut]]`; a stall goes on until it is cancelled.
        """
        if script.cut:
            raise PomeloError("provider_failed")
        await asyncio.get_running_loop().create_future()

    async def _play(self, sound: Sound, script: Script) -> AsyncGenerator[Event, None]:
        content_type = sound.content_type
        async with aclosing(self._in_thread(sound.pieces(half=script.halves))) as pieces:
            async for piece in pieces:
                yield Event(audio_chunk=AudioChunk(data=piece, content_type=content_type))
                content_type = ""
                if script.pace:
                    await self._sleep(script.pace)
        if script.halves:
            await self._break_off(script)

    async def _in_thread(self, steps: Iterator[_Step]) -> AsyncGenerator[_Step, None]:
        """Walks an iterator whose steps take work, each in a thread; left early, it goes no further."""
        loop = asyncio.get_running_loop()
        while (step := await loop.run_in_executor(self._threads, next, steps, None)) is not None:
            yield step

    async def _listen(self, job: Job[Any]) -> Heard:
        audio = job.audio or AudioSource("", 0)
        longest = job.model.limits.max_audio_seconds
        return await asyncio.get_running_loop().run_in_executor(self._threads, listen, audio, longest)


def _last_delta(content: str, finish: FinishReason.ValueType, prompt: int, completion: int) -> Event:
    event = Event()
    delta = event.text_delta
    delta.content = content
    delta.finish_reason = finish
    delta.usage.prompt_tokens = prompt
    delta.usage.completion_tokens = completion
    delta.usage.total_tokens = prompt + completion
    return event


def _seed(job: Job[Any]) -> str:
    return str(job.input.seed) if job.input.HasField("seed") else ""


def _tone(job: Job[Any]) -> str:
    """What a voice comes from."""
    return f"{job.input.voice.lower()}\n{_seed(job)}\n{job.model.name}"
