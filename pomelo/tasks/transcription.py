"""Speech-to-text tasks: their check, their length, and the folding of a transcript."""

from __future__ import annotations

import logging
from math import ceil, inf, isfinite

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.languages import iso_language
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Timestamps, Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.tasks.base import AudioInfo, CollectorContext, Estimate, TaskDefinition, no_usage
from pomelo.tasks.fields import known, within
from pomelo.tasks.speech import check_audio, check_language

SPEAKERS_MOST = 32

log = logging.getLogger("pomelo.tasks")


def check(given: SpeechToTextInput, model: Model) -> None:
    """Refuses what no speech-to-text model could take.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    check_audio(given.audio)
    check_language(given.language_code)
    within(given, "num_speakers", 1, SPEAKERS_MOST)
    known(given, "timestamps", Timestamps)


def bound(given: SpeechToTextInput, model: Model, route: Route, heard: AudioInfo) -> Estimate:
    """The length of the audio; in the end the provider reports it."""
    used = Usage(audio_ms=heard.max_ms(model))
    return Estimate(used, used, heard_ms=heard.ms)


class TranscriptionCollector:
    """Keeps the one result."""

    __slots__ = ("_folding", "_transcription")

    def __init__(self, folding: CollectorContext) -> None:
        self._folding = folding
        self._transcription: Transcription | None = None

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        """See Fold."""
        if event.result.HasField("transcription"):
            self._transcription = event.result.transcription
        return None

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        """See Fold."""
        if self._transcription is None:
            raise PomeloError("provider_failed")
        output = result.transcription
        output.CopyFrom(self._transcription)
        output.language = iso_language(self._transcription.language)
        _repair_times(output)
        bound = self._folding.bound
        # Nobody may know the length; then the audio lasts at least until its last word ends.
        ms = self._reported_ms() or min(bound.heard_ms, bound.maximum.audio_ms)
        output.audio_seconds = ms / 1000 or max((word.end for word in output.words), default=0.0)
        return None

    def used(self) -> tuple[Usage, bool]:
        """See Fold."""
        bound = self._folding.bound
        if ms := self._reported_ms():
            return Usage(audio_ms=ms), True
        return Usage(audio_ms=min(bound.heard_ms, bound.maximum.audio_ms) or bound.maximum.audio_ms), False

    def _reported_ms(self) -> int:
        """The length that the provider reports; 0 if there is none, as for silence, or it is impossible."""
        seconds = self._transcription.audio_seconds if self._transcription is not None else 0.0
        if not 0 < seconds < inf:  # false for NaN
            return 0
        if seconds * 1000 > self._folding.bound.maximum.audio_ms:
            log.warning(
                "a provider reported %g s of audio that has at most %d ms",
                seconds,
                self._folding.bound.maximum.audio_ms,
            )
            return 0
        return ceil(seconds * 1000)

    def close(self) -> None:
        """See Fold."""


def _repair_times(output: Transcription) -> None:
    """Replaces times that are no finite numbers, which JSON has not, by the end of the word before."""
    last = 0.0
    for word in output.words:
        if not isfinite(word.start):
            word.start = last
        if not isfinite(word.end):
            word.end = word.start
        last = word.end


KIND = TaskDefinition("speech_to_text", "speech_", check, TranscriptionCollector, bound, no_usage, audio=True)
