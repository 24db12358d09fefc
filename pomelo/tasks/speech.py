"""Text-to-speech and speech-to-speech tasks: validation, estimates and output of audio."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from pathlib import Path

from pomelo.audio_formats import AUDIO_FORMATS, AudioFormat
from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.languages import iso_language
from pomelo.catalog.pricing import Usage
from pomelo.catalog.voice_names import is_name
from pomelo.errors import PomeloError, invalid, missing
from pomelo.fields import (
    LANGUAGE,
    SPEECH_FIELDS,
    SPEECH_FORMAT,
    VOICE_SETTINGS_FIELDS,
    check_numbers,
    check_required_text,
)
from pomelo.gen.v1.media_pb2 import MediaDelivery, MediaSource
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, TextToSpeechInput
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.media.writer import MediaWriter
from pomelo.providers.chunks import MAX_AUDIO_BYTES
from pomelo.tasks.audio_meter import AudioMeter
from pomelo.tasks.base import (
    MAX_INLINE_FALLBACK,
    AudioInfo,
    Collector,
    CollectorContext,
    Estimate,
    ReadMedia,
    TaskDefinition,
    estimate_audio,
    max_inline,
)

CHARACTERS_PER_SECOND = 15
"""The pace of speech: the part of a text that was delivered is computed from the length of its audio."""

LENGTH_TOLERANCE_MS = 1000
"""Milliseconds by which an answer may be longer or shorter than the input audio."""


def check_text_to_speech(task_input: TextToSpeechInput, model: Model, read_media: ReadMedia) -> None:
    """Refuses an input that no text-to-speech model takes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    check_required_text(task_input, "text", model.limits.max_characters)
    _check_voice(task_input)
    check_language(task_input.language_code)


def check_speech_to_speech(task_input: SpeechToSpeechInput, model: Model, read_media: ReadMedia) -> None:
    """Refuses an input that no speech-to-speech model takes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    check_audio(task_input.audio)
    _check_voice(task_input)


def check_audio(audio: MediaSource) -> None:
    """Refuses missing audio: it must be inline or have a media_id.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    if audio.url:
        raise invalid("audio", "bytes, or the media_id of an upload. URLs of audio are not read")
    if not audio.data and not audio.media_id:
        raise missing("audio")


def check_language(code: str) -> None:
    """Refuses an unknown language; empty is valid.

    Raises:
        PomeloError: invalid_parameter.
    """
    if code and not iso_language(code):
        raise invalid("language_code", LANGUAGE)


def _check_voice(task_input: TextToSpeechInput | SpeechToSpeechInput) -> None:
    if not task_input.voice:
        raise missing("voice")
    if not is_name(task_input.voice):
        raise invalid("voice", "a voice's name, such as adam, or its id")
    if task_input.HasField("voice_settings"):
        check_numbers(task_input.voice_settings, VOICE_SETTINGS_FIELDS, "voice_settings.")
    if task_input.output_format and task_input.output_format not in AUDIO_FORMATS:
        raise invalid("output_format", SPEECH_FORMAT)
    check_numbers(task_input, SPEECH_FIELDS)


def estimate_text(task_input: TextToSpeechInput, model: Model, route: Route, audio: AudioInfo) -> Estimate:
    """The characters of the text."""
    usage = Usage(characters=len(task_input.text))
    return Estimate(usage, usage, exact=True)


def _speed(task_input: TextToSpeechInput | SpeechToSpeechInput) -> float:
    """The speed of the provider's speech, from an input fitted to its route."""
    return task_input.voice_settings.speed if task_input.voice_settings.HasField("speed") else 1.0


def _ceil(product: float) -> int:
    """Rounds up a product of floats, which may be a little above the exact one."""
    return ceil(round(product, 6))


def _bytes_per_second(task_input: TextToSpeechInput | SpeechToSpeechInput) -> int:
    """Bytes per second of the requested output format."""
    return AudioFormat.of(task_input.output_format).bytes_per_second


def text_media_size(task_input: TextToSpeechInput, estimate: Estimate) -> int:
    """The bytes of a text that is spoken at half the usual pace."""
    return 2 * estimate.maximum.characters * _bytes_per_second(task_input) // CHARACTERS_PER_SECOND


def audio_media_size(task_input: SpeechToSpeechInput, estimate: Estimate) -> int:
    """The bytes of audio as long as the input audio, at the requested speed."""
    return ceil(
        (estimate.maximum.audio_ms / _speed(task_input) + LENGTH_TOLERANCE_MS)
        * _bytes_per_second(task_input)
        / 1000
    )


class SpeechCollector(Collector):
    """Writes the audio to the media store as it arrives, and collects it if it is returned inline.

    If the store has no space, the answer has no link: a stream delivers the audio anyway, and a unary answer
    contains it inline, up to the size that every client accepts. Audio kept for an Idempotency-Key must be
    stored.
    """

    __slots__ = (
        "_chunks", "_content_type", "_context", "_max_inline", "_meter", "_passed_ms", "_size", "_writer",
    )  # fmt: skip

    def __init__(self, context: CollectorContext) -> None:
        super().__init__()
        self._context = context
        self._content_type = ""
        self._meter: AudioMeter | None = None
        self._passed_ms: int | None = None
        """The length of the audio that a stream passed on."""
        self._size = 0
        self._writer: MediaWriter | None = None
        self._chunks: list[bytes] = []
        self._max_inline = 0 if context.stream else max_inline(context.delivery, stream=False)

    def add(self, event: TaskEvent) -> TaskEvent | None:
        data = event.audio_chunk.data
        if self._meter is None:
            self._content_type = event.audio_chunk.content_type
            audio_format = AudioFormat.of(self._context.input.output_format)
            self._meter = AudioMeter(self._content_type, audio_format)
            if self._context.delivery != MediaDelivery.MEDIA_DELIVERY_INLINE or self._context.keep:
                self._writer = self._context.writer(self._content_type)
        self._size += len(data)
        self._meter.add(data)
        if self._writer is not None:
            try:
                self._writer.write(data)
            except PomeloError as error:
                self._continue_without_store(error, data)
                data = b""
        if self._context.stream:
            self.output_bytes += len(event.audio_chunk.data)
            self._passed_ms = self._meter.ms
            return event
        if self._size <= self._max_inline:
            self._chunks.append(data)
            return None
        if self._writer is None:
            # Too large to be returned inline: store it, if there is space.
            self._writer = self._context.writer(self._content_type)
            self._writer.write(b"".join(self._chunks))
            self._writer.write(data)
        self._chunks.clear()
        return None

    def finish(self, result: TaskResult) -> None:
        if not self._size:
            raise PomeloError("provider_failed")
        output = result.speech
        output.content_type = self._content_type
        if self._writer is not None:
            try:
                output.media.CopyFrom(self._writer.commit())
            except PomeloError as error:
                self._continue_without_store(error)
        if self._size <= self._max_inline:
            output.data = b"".join(self._chunks)

    def _continue_without_store(self, error: PomeloError, last: bytes = b"") -> None:
        """Continues without the store, with all audio so far; the store refused the last bytes, `last`.

        Raises:
            PomeloError: `error`, if the answer needs the store.
        """
        writer = self._writer
        assert writer is not None
        if self._context.keep or (not self._context.stream and self._size > MAX_INLINE_FALLBACK):
            raise error
        if not self._context.stream:
            self._chunks = [writer.contents(), last]
            self._max_inline = MAX_INLINE_FALLBACK
        writer.close()
        self._writer = None

    def usage(self, task_input: TextToSpeechInput | SpeechToSpeechInput) -> tuple[Usage, bool]:
        estimate = self._context.estimate
        if estimate.exact:
            return estimate.maximum, True  # the characters of the text
        measured = estimate.input_audio_ms
        output_ms = self._meter.ms if self._meter is not None else None
        expected = _ceil((output_ms or 0) * _speed(task_input))
        if not expected or (
            measured
            and expected <= 2 * measured + LENGTH_TOLERANCE_MS
            and measured <= 2 * expected + LENGTH_TOLERANCE_MS
        ):
            return Usage(audio_ms=estimate.likely_audio_ms), bool(measured)
        # The input was not measured, or the provider used other audio than was measured.
        return Usage(audio_ms=min(expected, estimate.maximum.audio_ms)), False

    def partial_usage(self, task_input: TextToSpeechInput | SpeechToSpeechInput) -> Usage:
        """The characters, or the input audio, that were spoken in the audio so far; all of them if its length
        can't be measured."""
        if not self.output_bytes:
            return Usage()
        estimate, output_ms = self._context.estimate, self._passed_ms
        if estimate.exact:
            maximum = estimate.maximum.characters
            if output_ms is None:
                return Usage(characters=maximum)
            characters = _ceil(output_ms * CHARACTERS_PER_SECOND * _speed(task_input) / 1000)
            return Usage(characters=min(max(characters, 1), maximum))
        if output_ms is None:
            return Usage(audio_ms=estimate.likely_audio_ms)
        spoken_ms = max(_ceil(output_ms * _speed(task_input)), 1)
        return Usage(audio_ms=min(spoken_ms, estimate.likely_audio_ms))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def output_size(result: TaskResult) -> int:
    return len(result.speech.data) or result.speech.media.size_bytes


def replay(result: TaskResult, audio: Path | None) -> Iterator[TaskEvent]:
    """The chunks of stored audio, and the result.

    Raises:
        PomeloError: store_unavailable.
    """
    content_type = result.speech.content_type
    assert audio is not None
    try:
        with audio.open("rb") as file:
            while piece := file.read(MAX_AUDIO_BYTES):
                event = TaskEvent()
                event.audio_chunk.data = piece
                event.audio_chunk.content_type = content_type
                content_type = ""
                yield event
    except OSError as error:
        raise PomeloError("store_unavailable") from error
    yield TaskEvent(completed=result)


TEXT_TO_SPEECH = TaskDefinition(
    "text_to_speech",
    "speech_",
    check_text_to_speech,
    estimate_text,
    SpeechCollector,
    output_size,
    replay,
    media_size=text_media_size,
)
SPEECH_TO_SPEECH = TaskDefinition(
    "speech_to_speech",
    "speech_",
    check_speech_to_speech,
    estimate_audio,
    SpeechCollector,
    output_size,
    replay,
    audio=True,
    media_size=audio_media_size,
)
