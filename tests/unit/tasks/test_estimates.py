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

from pomelo.catalog.catalog import Catalog, Limits, Model, Route
from pomelo.catalog.pricing import Prices, Usage
from pomelo.errors import PomeloError
from pomelo.fields import AUDIO_FORMATS
from pomelo.gen.v1 import image_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.media.duration import Measurer
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from pomelo.providers.base import AudioSource, Job
from pomelo.providers.fitting import fit
from pomelo.providers.sandbox import Sandbox
from pomelo.tasks import TASK_TYPES, text
from pomelo.tasks.base import AudioInfo, Collector, CollectorContext, Estimate, TaskDefinition
from pomelo.tasks.speech import SpeechCollector
from pomelo.tasks.text import TextCollector

MODELS = list(Catalog.load().models.values())
FIELDS = ("input_tokens", "output_tokens", "characters", "images", "pixels", "audio_ms")
PIXEL = "data:image/png;base64,iVBORw0KGgo="
NO_AUDIO = AudioInfo()
USER, ASSISTANT = text_pb2.ROLE_USER, text_pb2.ROLE_ASSISTANT


@pytest.fixture(scope="module")
async def measurer() -> AsyncIterator[Measurer]:
    """A measurer of audio."""
    measurer = Measurer()
    yield measurer
    await measurer.aclose()


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=120).filter(lambda s: "[[" not in s)
spoken = words.filter(bool)


def of_type(task_type: TaskType.ValueType) -> Any:
    """The models of a task type."""
    return st.sampled_from([model for model in MODELS if model.task_type == task_type])


def at_most(used: Usage, bound: Usage) -> bool:
    """Nothing in `used` is above `bound`."""
    return all(getattr(used, name) <= getattr(bound, name) for name in FIELDS)


@st.composite
def conversations(draw: Any) -> text_pb2.TextInput:
    """A valid text input."""
    task_input = text_pb2.TextInput()
    for content in draw(st.lists(words, min_size=1, max_size=4)):
        message = task_input.messages.add(role=draw(st.sampled_from([USER, ASSISTANT])))
        if message.role == USER and draw(st.booleans()):
            message.parts.parts.add(text=content)
            for _ in range(draw(st.integers(0, 3))):
                message.parts.parts.add(image_url=text_pb2.ImageUrl(url=PIXEL))
        else:
            message.content = content
    if draw(st.booleans()):
        task_input.max_tokens = draw(st.integers(1, 200_000))
    return task_input


async def answer(
    definition: TaskDefinition, model: Model, task_input: Any, folder: Path, *, stream: bool, audio: AudioSource | None = None,
    audio_info: AudioInfo = NO_AUDIO,
) -> AsyncIterator[tuple[Estimate, Collector, Usage | None]]:  # fmt: skip
    """Runs a task: the estimate, the collector after each event, and at the end the usage."""
    definition.check(task_input, model)
    route = Route("sandbox", model.name)
    estimate = definition.estimate(task_input, model, route, audio_info)
    assert at_most(estimate.minimum, estimate.maximum)
    store = MediaStore(folder, b"x" * 32)
    collector = definition.collector(
        CollectorContext(
            task_input, model, estimate, stream, lambda content_type: store.writer("a", content_type)
        )
    )
    job = Job("task_1", model, route, task_input, stream, 1e12, audio=audio)
    async with aclosing(getattr(Sandbox(), definition.name)(job)) as events:
        async for event in events:
            if collector.add(event) is not None:
                yield estimate, collector, None
    collector.finish(TaskResult())
    collector.close()
    yield estimate, collector, collector.usage()[0]


FORTY_EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FORTY_EXAMPLES
@given(model=of_type(TaskType.TASK_TYPE_TEXT), task_input=conversations(), stream=st.booleans())
async def test_a_text_uses_no_more_than_its_estimate(
    tmp_path: Path, model: Model, task_input: text_pb2.TextInput, stream: bool
) -> None:
    async for estimate, collector, used in answer(
        text.DEFINITION, model, task_input, tmp_path, stream=stream
    ):
        part = collector.partial_usage(task_input)
        assert at_most(part, estimate.maximum)
        assert part.output_tokens <= collector.output_bytes
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
    definition = TASK_TYPES[model.task_type]
    async for estimate, collector, used in answer(definition, model, task_input, tmp_path, stream=stream):
        assert estimate.exact
        assert collector.partial_usage(task_input) == Usage()
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
    (model,) = [model for model in MODELS if model.name == "eleven-labs-tts"]
    task_input = speech_pb2.TextToSpeechInput(text=content, voice="adam", output_format=output_format)
    if speed is not None:
        task_input.voice_settings.speed = speed
    definition = TASK_TYPES[model.task_type]
    parts, sizes = [], []
    async for estimate, collector, used in answer(definition, model, task_input, tmp_path, stream=stream):
        assert estimate.exact
        assert estimate.maximum == Usage(characters=len(content))
        part = collector.partial_usage(task_input)
        assert at_most(part, estimate.maximum)
        parts.append(part.characters)
        sizes.append(collector.output_bytes)
        assert used in (None, estimate.maximum)
    assert parts == sorted(parts)
    # Audio of the sandbox lasts at least 0.3 s, and contains its text: short audio has no typical pace.
    if stream and len(content) >= 60:
        for characters, size in zip(parts, sizes, strict=True):
            if size >= 20_000:
                assert characters <= len(content) * size / sizes[-1] + 1


@FORTY_EXAMPLES
@given(
    name=st.sampled_from(["eleven-labs-sts", "eleven-labs-stt"]),
    data=st.one_of(
        st.binary(min_size=1, max_size=60_000),
        st.builds(
            lambda head, rest: head + rest,
            st.sampled_from(
                [
                    b"RIFF\x24\x00\x00\x00WAVEfmt ",
                    b"OggS",
                    b"ID3\x03",
                    b"\xff\xfb\x90\x64",
                    b"fLaC",
                    b"\0\0\0\x20ftypM4A ",
                ]
            ),
            st.binary(max_size=5_000),
        ),
    ),
    content_type=st.sampled_from(["", "audio/mpeg", "audio/wav", "audio/pcm;rate=8000", "audio/basic"]),
    stream=st.booleans(),
)
async def test_input_audio_uses_no_more_than_its_estimate(
    tmp_path: Path, measurer: Measurer, name: str, data: bytes, content_type: str, stream: bool
) -> None:
    (model,) = [model for model in MODELS if model.name == name]
    definition = TASK_TYPES[model.task_type]
    task_input: Any = (
        speech_pb2.SpeechToTextInput()
        if name.endswith("stt")
        else speech_pb2.SpeechToSpeechInput(voice="adam")
    )
    task_input.audio.data = data
    audio = AudioSource(content_type, len(data), data=data)
    measured = await measurer.measure(audio)
    audio = replace(audio, ms=measured.ms, content_type=measured.content_type)
    audio_info = AudioInfo(audio.size, audio.ms)
    async for estimate, collector, used in answer(
        definition, model, task_input, tmp_path, stream=stream, audio=audio, audio_info=audio_info
    ):
        assert at_most(collector.partial_usage(task_input), estimate.maximum)
        if used is not None:
            assert at_most(used, estimate.maximum)
            assert used.audio_ms > 0
            assert not estimate.exact or used == estimate.maximum


# --- usage that a provider does not report


def text_collector(*, stream: bool, keep: bool = False) -> tuple[TextCollector, text_pb2.TextInput, Estimate]:
    """A collector of a conversation of three words."""
    task_input = text_pb2.TextInput(messages=[text_pb2.Message(role=USER, content="one two three")])
    model = Model("m", TaskType.TASK_TYPE_TEXT, (), Limits(), Prices(), "")
    bound = text.estimate(task_input, model, Route("p", "m"), AudioInfo())
    store: Any = None
    return TextCollector(CollectorContext(task_input, model, bound, stream, store, keep)), task_input, bound


def delta(content: str, *, last: bool = False) -> StreamTaskResponse:
    """An event of a text, without usage."""
    event = StreamTaskResponse()
    event.text_delta.content = content
    if last:
        event.text_delta.finish_reason = text_pb2.FINISH_REASON_STOP
    return event


@pytest.mark.parametrize(
    "pieces",
    [("four words are here",), ("four ", "words ", "are ", "here"), ("", "four words", "", " are here")],
)
def test_a_unary_answer_without_reported_usage_is_not_free(pieces: tuple[str, ...]) -> None:
    collector, _, _ = text_collector(stream=False)
    for piece in pieces[:-1]:
        collector.add(delta(piece))
    collector.add(delta(pieces[-1], last=True))
    result = TaskResult()
    collector.finish(result)
    used, counted = collector.usage()
    assert not counted
    assert used.input_tokens == 3
    assert 2 <= used.output_tokens <= 4
    assert result.text.usage.completion_tokens == used.output_tokens


def test_deltas_without_text_are_not_counted_as_tokens() -> None:
    collector, _, _ = text_collector(stream=True)
    for piece in ("", "one", "", " two", ""):
        collector.add(delta(piece))
    collector.add(delta("", last=True))
    collector.finish(TaskResult())
    assert collector.usage()[0].output_tokens == 2


def test_a_stored_stream_has_its_complete_text() -> None:
    collector, _, _ = text_collector(stream=True, keep=True)
    for piece in ("one", " two"):
        assert collector.add(delta(piece)) is not None
    collector.add(delta(" three", last=True))
    result = TaskResult()
    collector.finish(result)
    assert result.text.content == "one two three"


def speech(speed: float | None, output_format: str = "pcm_16000") -> speech_pb2.TextToSpeechInput:
    """A text of 1,000 characters to speak."""
    task_input = speech_pb2.TextToSpeechInput(text="x" * 1000, voice="adam", output_format=output_format)
    if speed is not None:
        task_input.voice_settings.speed = speed
    return task_input


def interrupted(estimate: Estimate, task_input: Any, content_type: str, size: int) -> Usage:
    """The usage of streamed audio that ends early, after `size` bytes."""
    store: Any = None
    task_input.response_format = ResponseFormat.RESPONSE_FORMAT_B64_JSON  # nothing is stored
    model = Model("m", TaskType.TASK_TYPE_TEXT_TO_SPEECH, (), Limits(), Prices(), "")
    collector = SpeechCollector(CollectorContext(task_input, model, estimate, True, store))
    if size:
        event = StreamTaskResponse()
        event.audio_chunk.data = bytes(size)
        event.audio_chunk.content_type = content_type
        collector.add(event)
    return collector.partial_usage(task_input)


SAMPLES = "audio/pcm;rate=16000"


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.7, None, 1.2, 4])
def test_interrupted_speech_costs_the_spoken_characters_at_its_speed(speed: float | None) -> None:
    estimate = Estimate(Usage(characters=1000), Usage(characters=1000), exact=True)
    # The sandbox speaks a character in 60 ms at speed 1.
    ms = round(100 * 60 / (speed or 1))
    assert 89 <= interrupted(estimate, speech(speed), SAMPLES, ms * 32).characters <= 91


def test_interrupted_speech_is_billed_at_the_speed_sent_to_the_vendor() -> None:
    definition = TASK_TYPES[TaskType.TASK_TYPE_TEXT_TO_SPEECH]
    (model,) = [model for model in MODELS if model.name == "eleven-labs-tts"]
    for route, sent_speed in (
        (Route("p", "m", clamp={"speed": (0.7, 1.2, 0)}), 0.7),
        (Route("p", "m", drop=frozenset({"speed"})), 1.0),
    ):
        fitted = fit(speech(0.25), model, route).input
        estimate = definition.estimate(fitted, model, route, AudioInfo())
        ms = round(100 * 60 / sent_speed)
        assert 89 <= interrupted(estimate, fitted, SAMPLES, ms * 32).characters <= 91


def test_interrupted_audio_that_cannot_be_measured_costs_its_whole_input() -> None:
    task_input = speech_pb2.SpeechToSpeechInput(voice="adam")
    estimate = Estimate(Usage(audio_ms=1_020), Usage(audio_ms=1_020), input_audio_ms=1_000)
    unknown = "audio/flac"
    assert interrupted(estimate, task_input, unknown, 100) == Usage(audio_ms=1_000)
    assert interrupted(estimate, task_input, unknown, 0) == Usage()
    estimate = Estimate(Usage(characters=1000), Usage(characters=1000), exact=True)
    assert interrupted(estimate, speech(None, "mp3_44100_128"), unknown, 100) == estimate.maximum
    assert interrupted(estimate, speech(None), SAMPLES, 0) == Usage()


def test_audio_that_could_not_be_stored_for_a_replay_is_not_billed(tmp_path: Path) -> None:
    store = MediaStore(tmp_path, b"x" * 32, limits=MediaLimits(10**9, 150_000, reserve=0))
    task_input = speech(None)
    estimate = Estimate(Usage(characters=1000), Usage(characters=1000), exact=True)
    (model,) = [model for model in MODELS if model.name == "eleven-labs-tts"]
    collector = SpeechCollector(
        CollectorContext(task_input, model, estimate, True, lambda name: store.writer("ann", name), keep=True)
    )
    event = StreamTaskResponse()
    event.audio_chunk.data = bytes(96_000)
    event.audio_chunk.content_type = SAMPLES
    collector.add(event)
    delivered = collector.partial_usage(task_input)
    with pytest.raises(PomeloError):
        collector.add(event)
    collector.close()
    assert collector.partial_usage(task_input) == delivered
    assert collector.output_bytes == 96_000


@pytest.mark.parametrize(
    ("answered", "billed", "measured"),
    [
        (0, 10_000, True),
        (4_000, 4_000, False),
        (9_000, 10_000, True),
        (10_000, 10_000, True),
        (20_900, 10_000, True),
        (60_000, 10_200, False),
    ],
)
@pytest.mark.parametrize("speed", [None, 0.7, 1.2])
def test_an_answer_of_another_length_than_its_input_is_billed_by_its_length_up_to_the_maximum(
    tmp_path: Path, answered: int, billed: int, measured: bool, speed: float | None
) -> None:
    definition = TASK_TYPES[TaskType.TASK_TYPE_SPEECH_TO_SPEECH]
    task_input = speech_pb2.SpeechToSpeechInput(voice="adam", output_format="pcm_16000")
    if speed is not None:
        task_input.voice_settings.speed = speed
    bound = Estimate(Usage(audio_ms=10_200), Usage(audio_ms=10_200), input_audio_ms=10_000)
    store = MediaStore(tmp_path, b"x" * 32)
    model = next(model for model in MODELS if model.name == "eleven-labs-sts")
    collector = definition.collector(
        CollectorContext(task_input, model, bound, True, lambda content_type: store.writer("a", content_type))
    )
    event = StreamTaskResponse()
    event.audio_chunk.content_type = "audio/pcm;rate=16000" if answered else "audio/webm"
    event.audio_chunk.data = bytes(round(answered / (speed or 1)) * 32) or b"\x1aE\xdf\xa3" * 10
    if not answered:
        task_input.output_format = "opus_48000_32"
    collector.add(event)
    collector.finish(TaskResult())
    used, counted = collector.usage()
    assert used.audio_ms == pytest.approx(billed, abs=2)
    assert counted == measured
