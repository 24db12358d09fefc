"""No answer of the sandbox exceeds its estimate, for any valid input; a partial answer costs no more than its part."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pomelo.audio_formats import AUDIO_FORMATS
from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.gen.v1 import image_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.media.duration import Measurer
from pomelo.media.store import MediaStore
from pomelo.providers.base import AudioSource, Job
from pomelo.providers.sandbox import Sandbox
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import AudioInfo, Collector, Estimate
from tests.unit.tasks.collectors import MODELS, PIXEL, collector, finish, no_files

FIELDS = ("input_tokens", "output_tokens", "characters", "images", "pixels", "audio_ms")
USER, ASSISTANT = text_pb2.ROLE_USER, text_pb2.ROLE_ASSISTANT


@pytest.fixture(scope="module")
async def measurer() -> AsyncIterator[Measurer]:
    measurer = Measurer()
    yield measurer
    await measurer.aclose()


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=120).filter(lambda s: "[[" not in s)
spoken = words.filter(bool)


def of_type(task_type: TaskType.ValueType) -> Any:
    return st.sampled_from([model for model in MODELS.values() if model.task_type == task_type])


def at_most(used: Usage, bound: Usage) -> bool:
    return all(getattr(used, name) <= getattr(bound, name) for name in FIELDS)


@st.composite
def conversations(draw: Any) -> text_pb2.TextInput:
    task_input = text_pb2.TextInput()
    for content in draw(st.lists(words, min_size=1, max_size=4)):
        message = task_input.messages.add(role=draw(st.sampled_from([USER, ASSISTANT])))
        message.content.add(text=content)
        if message.role == USER:
            for _ in range(draw(st.integers(0, 3))):
                message.content.add().image.source.url = PIXEL
    if draw(st.booleans()):
        task_input.max_tokens = draw(st.integers(1, 200_000))
    return task_input


async def answer(
    model: Model, task_input: Any, folder: Path, *, stream: bool, audio: AudioSource | None = None
) -> AsyncIterator[tuple[Estimate, Collector, Usage | None]]:
    """Runs a task: the estimate, the collector after each event, and at the end the usage."""
    definition = TASK_TYPES[model.task_type]
    definition.check(task_input, model, no_files)
    route = Route("sandbox", model.name)
    audio_info = AudioInfo(audio.size, audio.ms) if audio else AudioInfo()
    estimate = definition.estimate(task_input, model, route, audio_info)
    assert at_most(estimate.minimum, estimate.maximum)
    collected = collector(
        model.name, MediaStore(folder, b"x" * 32), stream=stream, given=task_input, estimate=estimate
    )
    job = Job("task_1", model, route, task_input, stream, 1e12, audio=audio)
    async with aclosing(getattr(Sandbox(), definition.name)(job)) as events:
        async for event in events:
            if collected.add(event) is not None:
                yield estimate, collected, None
    finish(collected)
    yield estimate, collected, collected.usage(task_input)[0]


FORTY_EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FORTY_EXAMPLES
@given(model=of_type(TaskType.TASK_TYPE_TEXT), task_input=conversations(), stream=st.booleans())
async def test_a_text_uses_no_more_than_its_estimate(
    tmp_path: Path, model: Model, task_input: text_pb2.TextInput, stream: bool
) -> None:
    async for estimate, collected, used in answer(model, task_input, tmp_path, stream=stream):
        part = collected.partial_usage(task_input)
        assert at_most(part, estimate.maximum)
        assert part.output_tokens <= collected.output_bytes
        if used is not None:
            assert at_most(used, estimate.maximum)
            if stream:
                assert part.output_tokens <= used.output_tokens
            assert task_input.HasField("max_tokens") <= (estimate.minimum == estimate.maximum)


@FORTY_EXAMPLES
@given(
    model=of_type(TaskType.TASK_TYPE_IMAGE),
    prompt=spoken,
    sides=st.tuples(st.integers(64, 200), st.integers(64, 200)),
    stream=st.booleans(),
)
async def test_an_image_uses_exactly_its_estimate(
    tmp_path: Path, model: Model, prompt: str, sides: tuple[int, int], stream: bool
) -> None:
    task_input = image_pb2.ImageInput(prompt=prompt, width=sides[0], height=sides[1])
    async for estimate, collected, used in answer(model, task_input, tmp_path, stream=stream):
        assert estimate.exact
        assert collected.partial_usage(task_input) == Usage()
        assert used in (None, estimate.maximum)
    assert estimate.maximum.pixels == sides[0] * sides[1]


@FORTY_EXAMPLES
@given(
    content=spoken,
    output_format=st.sampled_from(["", *sorted(AUDIO_FORMATS)]),
    speed=st.one_of(st.none(), st.floats(0.25, 4)),
    stream=st.booleans(),
)
async def test_speech_uses_its_characters_and_partial_speech_at_most_the_delivered_part(
    tmp_path: Path, content: str, output_format: str, speed: float | None, stream: bool
) -> None:
    model = MODELS["eleven-labs-tts"]
    task_input = speech_pb2.TextToSpeechInput(text=content, voice="adam", output_format=output_format)
    if speed is not None:
        task_input.voice_settings.speed = speed
    parts, sizes = [], []
    async for estimate, collected, used in answer(model, task_input, tmp_path, stream=stream):
        assert estimate.exact
        assert estimate.maximum == Usage(characters=len(content))
        part = collected.partial_usage(task_input)
        assert at_most(part, estimate.maximum)
        parts.append(part.characters)
        sizes.append(collected.output_bytes)
        assert used in (None, estimate.maximum)
    assert parts == sorted(parts)
    # Audio of the sandbox lasts at least 0.3 s, and contains its text: short audio has no typical pace.
    if stream and len(content) >= 60:
        for characters, size in zip(parts, sizes, strict=True):
            if size >= 20_000:
                assert characters <= len(content) * size / sizes[-1] + 1


HEADS = [
    *(b"RIFF\x24\x00\x00\x00WAVEfmt ", b"OggS", b"ID3\x03"),
    *(b"\xff\xfb\x90\x64", b"fLaC", b"\0\0\0\x20ftypM4A "),
]


@FORTY_EXAMPLES
@given(
    name=st.sampled_from(["eleven-labs-sts", "eleven-labs-stt"]),
    data=st.one_of(
        st.binary(min_size=1, max_size=60_000),
        st.builds(
            lambda head, rest: head + rest,
            st.sampled_from(HEADS),
            st.binary(max_size=5_000),
        ),
    ),
    content_type=st.sampled_from(["", "audio/mpeg", "audio/wav", "audio/pcm;rate=8000", "audio/basic"]),
    stream=st.booleans(),
)
async def test_input_audio_uses_no_more_than_its_estimate(
    tmp_path: Path, measurer: Measurer, name: str, data: bytes, content_type: str, stream: bool
) -> None:
    task_input: Any = (
        speech_pb2.SpeechToTextInput()
        if name.endswith("stt")
        else speech_pb2.SpeechToSpeechInput(voice="adam")
    )
    task_input.audio.data = data
    audio = AudioSource(content_type, len(data), data=data)
    measured = await measurer.measure(audio)
    audio = replace(audio, ms=measured.ms, content_type=measured.content_type)
    async for estimate, collected, used in answer(
        MODELS[name], task_input, tmp_path, stream=stream, audio=audio
    ):
        assert at_most(collected.partial_usage(task_input), estimate.maximum)
        if used is not None:
            assert at_most(used, estimate.maximum)
            assert used.audio_ms > 0
            assert not estimate.exact or used == estimate.maximum
