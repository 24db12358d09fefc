"""Speech-to-text tasks: validation, estimate and output of a transcription."""

from __future__ import annotations

import logging
from math import ceil, inf
from typing import Any

from google.protobuf.duration_pb2 import Duration

from pomelo.catalog.catalog import Model
from pomelo.catalog.languages import iso_language
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.fields import MANY_WORDS, SPEECH_TO_TEXT_FIELDS, check_enum, check_numbers
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, TimestampGranularity, Transcription
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.protobuf.times import from_duration, is_duration
from pomelo.providers.base import log_fields
from pomelo.tasks.base import Collector, CollectorContext, ReadMedia, TaskDefinition, estimate_audio
from pomelo.tasks.speech import check_audio, check_language

log = logging.getLogger("pomelo.tasks")


def check(task_input: SpeechToTextInput, model: Model, read_media: ReadMedia) -> None:
    """Refuses an input that no speech-to-text model takes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    check_audio(task_input.audio)
    check_language(task_input.language_code)
    check_numbers(task_input, SPEECH_TO_TEXT_FIELDS)
    check_enum(task_input, "timestamps", TimestampGranularity)


class TranscriptionCollector(Collector):
    """Keeps the transcription until the end."""

    __slots__ = ("_context", "_output", "_reported_ms", "_transcription")

    def __init__(self, context: CollectorContext) -> None:
        super().__init__()
        self._context = context
        self._transcription: Transcription | None = None
        self._output = Transcription()
        self._reported_ms = 0
        """The length that the provider reports; 0 if it is missing, as for silence, or impossible."""

    def add(self, event: TaskEvent) -> TaskEvent | None:
        if event.completed.HasField("transcription"):
            self._transcription = event.completed.transcription
            self._reported_ms = self._possible_ms(self._transcription.audio_seconds)
        return None

    def finish(self, result: TaskResult) -> None:
        if self._transcription is None:
            raise PomeloError("provider_failed")
        self._output = result.transcription
        self.must_count = len(self._transcription.words) > MANY_WORDS
        if not self.must_count:
            self.count()

    def count(self) -> None:
        """Writes the output."""
        output = self._output
        assert self._transcription is not None  # as in `finish`
        output.CopyFrom(self._transcription)
        output.ClearField("language_code")
        if language := iso_language(self._transcription.language_code.strip()):
            output.language_code = language
        _complete_times(output)
        estimate = self._context.estimate
        # If the length is unknown, the audio lasts at least until the end of its last word.
        ms = self._reported_ms or min(estimate.input_audio_ms, estimate.maximum.audio_ms)
        ends = (from_duration(word.end_offset) for word in output.words)
        output.audio_seconds = ms / 1000 or max(ends, default=0.0)

    def usage(self, task_input: Any) -> tuple[Usage, bool]:
        if self._reported_ms:
            return Usage(audio_ms=self._reported_ms), True
        return Usage(audio_ms=self._context.estimate.likely_audio_ms), False

    def _possible_ms(self, seconds: float) -> int:
        if not 0 < seconds < inf:  # false for NaN
            return 0
        if seconds * 1000 > self._context.estimate.maximum.audio_ms:
            log.warning(
                "a provider reported %g s of audio that has at most %d ms",
                seconds,
                self._context.estimate.maximum.audio_ms,
                extra=log_fields(),
            )
            return 0
        return ceil(round(seconds * 1000, 6))  # 4.009 s are 4,009 ms, although the product is above


def _complete_times(output: Transcription) -> None:
    """Sets offsets that are missing or no valid Duration: a word begins with the end of the previous one, and
    ends where it begins."""
    last = Duration()
    for word in output.words:
        if not (word.HasField("start_offset") and is_duration(word.start_offset)):
            word.start_offset.CopyFrom(last)
        if not (word.HasField("end_offset") and is_duration(word.end_offset)):
            word.end_offset.CopyFrom(word.start_offset)
        last = word.end_offset


def output_size(result: TaskResult) -> int:
    return len(result.transcription.text.encode())


DEFINITION = TaskDefinition(
    "speech_to_text", "speech_", check, estimate_audio, TranscriptionCollector, output_size, audio=True
)
