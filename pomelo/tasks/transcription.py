"""Speech-to-text tasks: validation, estimate and output of a transcription."""

from __future__ import annotations

import logging
from math import ceil, inf, isfinite

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.languages import iso_language
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.fields import SPEECH_TO_TEXT_FIELDS, check_enum, check_numbers
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Timestamps, Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.tasks.base import AudioInfo, Collector, CollectorContext, Estimate, TaskDefinition
from pomelo.tasks.speech import check_audio, check_language

log = logging.getLogger("pomelo.tasks")


def check(task_input: SpeechToTextInput, model: Model) -> None:
    """Refuses an input that no speech-to-text model takes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    check_audio(task_input.audio)
    check_language(task_input.language_code)
    check_numbers(task_input, SPEECH_TO_TEXT_FIELDS)
    check_enum(task_input, "timestamps", Timestamps)


def estimate(task_input: SpeechToTextInput, model: Model, route: Route, audio: AudioInfo) -> Estimate:
    """The maximum length of the audio; the provider reports the actual one at the end."""
    usage = Usage(audio_ms=audio.max_ms(model))
    return Estimate(usage, usage, input_audio_ms=audio.ms)


class TranscriptionCollector(Collector):
    """Keeps the transcription until the end."""

    __slots__ = ("_context", "_transcription")

    def __init__(self, context: CollectorContext) -> None:
        super().__init__()
        self._context = context
        self._transcription: Transcription | None = None

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        if event.result.HasField("transcription"):
            self._transcription = event.result.transcription
        return None

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        if self._transcription is None:
            raise PomeloError("provider_failed")
        output = result.transcription
        output.CopyFrom(self._transcription)
        output.language = iso_language(self._transcription.language)
        _repair_times(output)
        estimate = self._context.estimate
        # If the length is unknown, the audio lasts at least until the end of its last word.
        ms = self._reported_ms() or min(estimate.input_audio_ms, estimate.maximum.audio_ms)
        output.audio_seconds = ms / 1000 or max((word.end for word in output.words), default=0.0)
        return None

    def usage(self) -> tuple[Usage, bool]:
        estimate = self._context.estimate
        if ms := self._reported_ms():
            return Usage(audio_ms=ms), True
        return Usage(
            audio_ms=min(estimate.input_audio_ms, estimate.maximum.audio_ms) or estimate.maximum.audio_ms
        ), False

    def _reported_ms(self) -> int:
        """The length that the provider reports; 0 if it is missing, as for silence, or impossible."""
        seconds = self._transcription.audio_seconds if self._transcription is not None else 0.0
        if not 0 < seconds < inf:  # false for NaN
            return 0
        if seconds * 1000 > self._context.estimate.maximum.audio_ms:
            log.warning(
                "a provider reported %g s of audio that has at most %d ms",
                seconds,
                self._context.estimate.maximum.audio_ms,
            )
            return 0
        return ceil(seconds * 1000)


def _repair_times(output: Transcription) -> None:
    """Replaces times that are not finite, which JSON can't express, by the end of the previous word."""
    last = 0.0
    for word in output.words:
        if not isfinite(word.start):
            word.start = last
        if not isfinite(word.end):
            word.end = word.start
        last = word.end


def output_size(result: TaskResult) -> int:
    return len(result.transcription.text.encode())


DEFINITION = TaskDefinition(
    "speech_to_text", "speech_", check, estimate, TranscriptionCollector, output_size, audio=True
)
