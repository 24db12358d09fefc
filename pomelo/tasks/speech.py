"""Text-to-speech and speech-to-speech tasks: their checks, their measure, and the folding of sound."""

from __future__ import annotations

from math import ceil

from pomelo.catalog.catalog import DEFAULT_FORMAT, Model, Route
from pomelo.catalog.languages import iso_language
from pomelo.catalog.pricing import Usage
from pomelo.catalog.voice_names import is_name
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.speech_pb2 import AudioInput, SpeechToSpeechInput, TextToSpeechInput, VoiceSettings
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.media.audio import RATES
from pomelo.media.store import MediaWriter
from pomelo.tasks.audio_meter import AudioMeter
from pomelo.tasks.base import (
    MAX_INLINE_FALLBACK,
    AudioInfo,
    CollectorContext,
    Estimate,
    Progress,
    TaskDefinition,
    max_inline,
)
from pomelo.tasks.fields import filled, known, within

FORMATS = frozenset(
    [f"mp3_44100_{kbits}" for kbits in (32, 64, 96, 128, 192)]
    + ["mp3_22050_32", "mp3_24000_48", "ulaw_8000", "alaw_8000"]
    + [f"{codec}_{rate}" for codec in ("pcm", "wav") for rate in RATES]
    + [f"opus_48000_{kbits}" for kbits in (32, 64, 96, 128, 192)]
)
"""Every output_format: codec, samples a second, kbit/s."""

SPOKEN_CHARACTERS = 15
"""Characters that are spoken in a second: what was delivered of a text is told by its length in time."""

SLACK_MS = 1000
"""Milliseconds by which any answer may be longer or shorter than the input audio."""


def check_text_to_speech(given: TextToSpeechInput, model: Model) -> None:
    """Refuses what no text-to-speech model could take.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    filled(given, "text", model.limits.max_characters)
    _check_voice(given)
    check_language(given.language_code)


def check_speech_to_speech(given: SpeechToSpeechInput, model: Model) -> None:
    """Refuses what no speech-to-speech model could take.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    check_audio(given.audio)
    _check_voice(given)


def check_audio(audio: AudioInput) -> None:
    """A sound must be there, inline or by its id.

    Raises:
        PomeloError: missing_parameter.
    """
    if not audio.data and not audio.media_id:
        raise missing("audio")


def check_language(code: str) -> None:
    """A language, when given, must be one.

    Raises:
        PomeloError: invalid_parameter.
    """
    if code and not iso_language(code):
        raise invalid(
            "language_code", "an ISO 639 code, such as en, eng or haw, or a language tag, such as en-US"
        )


def _check_voice(given: TextToSpeechInput | SpeechToSpeechInput) -> None:
    if not given.voice:
        raise missing("voice")
    if not is_name(given.voice):
        raise invalid("voice", "a voice's name, such as adam, or its id")
    if given.HasField("voice_settings"):
        settings: VoiceSettings = given.voice_settings
        for field in ("stability", "similarity_boost", "style"):
            within(settings, field, 0, 1, f"voice_settings.{field}")
        within(settings, "speed", 0.25, 4, "voice_settings.speed")
    if given.output_format and given.output_format not in FORMATS:
        raise invalid("output_format", "a documented format, such as mp3_44100_128 or pcm_16000")
    within(given, "seed", 0, 2**32 - 1)
    known(given, "response_format", ResponseFormat)


def bound_text(given: TextToSpeechInput, model: Model, route: Route, heard: AudioInfo) -> Estimate:
    """The characters of the text."""
    used = Usage(characters=len(given.text))
    return Estimate(used, used, exact=True)


def bound_sound(given: SpeechToSpeechInput, model: Model, route: Route, heard: AudioInfo) -> Estimate:
    """The length of the input audio; the answer is about as long."""
    used = Usage(audio_ms=heard.max_ms(model))
    return Estimate(used, used, heard_ms=heard.ms)


def partly_text(given: TextToSpeechInput, bound: Estimate, delivered: Progress) -> Usage:
    """The characters spoken in the delivered time; all of them if that can't be measured."""
    if not delivered.size:
        return Usage()
    most = bound.maximum.characters
    if delivered.audio_ms is None:
        return Usage(characters=most)
    spoken = ceil(delivered.audio_ms * SPOKEN_CHARACTERS * _speed(given) / 1000)
    return Usage(characters=min(max(spoken, 1), most))


def partly_sound(given: SpeechToSpeechInput, bound: Estimate, delivered: Progress) -> Usage:
    """The input audio that was spoken in the delivered time; all of it if that can't be measured."""
    if not delivered.size:
        return Usage()
    most = min(bound.heard_ms, bound.maximum.audio_ms) or bound.maximum.audio_ms
    if delivered.audio_ms is None:
        return Usage(audio_ms=most)
    return Usage(audio_ms=min(max(ceil(delivered.audio_ms * _speed(given)), 1), most))


def _speed(given: TextToSpeechInput | SpeechToSpeechInput) -> float:
    """The speed that the provider speaks at, of an input as its route takes it."""
    return given.voice_settings.speed if given.voice_settings.HasField("speed") else 1.0


def _per_second(given: TextToSpeechInput | SpeechToSpeechInput) -> int:
    """Bytes per second of the requested output format."""
    codec, rate, *kbits = (given.output_format or DEFAULT_FORMAT).split("_")
    width = 1 if codec in ("ulaw", "alaw") else 2
    return int(kbits[0]) * 125 if kbits else int(rate) * width


def media_size_of_text(given: TextToSpeechInput, bound: Estimate) -> int:
    """The media size of a text that is spoken at half the usual speed."""
    return 2 * bound.maximum.characters * _per_second(given) // SPOKEN_CHARACTERS


def media_size_of_sound(given: SpeechToSpeechInput, bound: Estimate) -> int:
    """The media size of audio as long as the input audio at the speed that is asked for."""
    return ceil((bound.maximum.audio_ms / _speed(given) + SLACK_MS) * _per_second(given) / 1000)


class SpeechCollector:
    """Writes the audio to the media store as it arrives, and collects it if it is returned inline.

    If the store has no room, the answer has no link: a stream delivers the audio anyway, and a
    whole answer contains it inline, up to the size that every client accepts. Audio kept for an
    Idempotency-Key must be stored.
    """

    __slots__ = ("_chunks", "_content_type", "_folding", "_meter", "_most", "_size", "_writer")

    def __init__(self, folding: CollectorContext) -> None:
        self._folding = folding
        self._content_type = ""
        self._meter: AudioMeter | None = None
        self._size = 0
        self._writer: MediaWriter | None = None
        self._chunks: list[bytes] = []
        self._most = 0 if folding.stream else max_inline(folding.input.response_format, stream=False)

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        """See Fold."""
        data = event.audio_chunk.data
        if self._meter is None:
            self._content_type = event.audio_chunk.content_type
            output_format = self._folding.input.output_format or DEFAULT_FORMAT
            self._meter = AudioMeter(self._content_type, output_format)
            wanted = self._folding.input.response_format
            if wanted != ResponseFormat.RESPONSE_FORMAT_B64_JSON or self._folding.keep:
                self._writer = self._folding.writer(self._content_type)
        self._size += len(data)
        self._meter.add(data)
        if self._writer is not None:
            try:
                self._writer.write(data)
            except PomeloError as error:
                self._unstored(error, data)
                data = b""
        if self._folding.stream:
            self._folding.delivered.audio_ms = self._meter.ms
            return event
        if self._size <= self._most:
            self._chunks.append(data)
        elif self._writer is None:
            # Too large to be returned inline: store it, if there is room.
            self._writer = self._folding.writer(self._content_type)
            self._writer.write(b"".join(self._chunks))
            self._writer.write(data)
        return None

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        """See Fold."""
        if not self._size:
            raise PomeloError("provider_failed")
        output = result.speech
        output.content_type = self._content_type
        if self._writer is not None:
            try:
                output.media.CopyFrom(self._writer.commit())
            except PomeloError as error:
                self._unstored(error)
        if self._size <= self._most:
            output.data = b"".join(self._chunks)
        return None

    def _unstored(self, error: PomeloError, last: bytes = b"") -> None:
        """Continues without the store, with all audio so far; the store refused its last bytes,
        `last`.

        Raises:
            PomeloError: `error`, if the answer needs the store.
        """
        writer = self._writer
        assert writer is not None
        if self._folding.keep or (not self._folding.stream and self._size > MAX_INLINE_FALLBACK):
            raise error
        if not self._folding.stream:
            before = self._size - len(last)
            self._chunks = [writer.contents()[:before], last]
            self._most = MAX_INLINE_FALLBACK
        writer.close()
        self._writer = None

    def used(self) -> tuple[Usage, bool]:
        """See Fold."""
        bound = self._folding.bound
        if bound.exact:
            return bound.maximum, True  # a text's characters
        most, heard = bound.maximum.audio_ms, bound.heard_ms
        spoken = self._meter.ms if self._meter is not None else None
        answered = ceil((spoken or 0) * _speed(self._folding.input))
        if not answered or (heard and answered <= 2 * heard + SLACK_MS and heard <= 2 * answered + SLACK_MS):
            return Usage(audio_ms=min(heard, most) or most), bool(heard)
        # The input was not measured, or the provider used other audio than was measured.
        return Usage(audio_ms=min(answered, most)), False

    def close(self) -> None:
        """See Fold."""
        if self._writer is not None:
            self._writer.close()


TEXT_TO_SPEECH = TaskDefinition(
    "text_to_speech",
    "speech_",
    check_text_to_speech,
    SpeechCollector,
    bound_text,
    partly_text,
    media_size=media_size_of_text,
)
SPEECH_TO_SPEECH = TaskDefinition(
    "speech_to_speech",
    "speech_",
    check_speech_to_speech,
    SpeechCollector,
    bound_sound,
    partly_sound,
    audio=True,
    media_size=media_size_of_sound,
)
