"""Speech-to-text tasks: their check, their length, and the folding of a transcript."""

import logging
from math import ceil

from pomelo.catalog import Model, Route
from pomelo.errors import PomeloError
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Timestamps, Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.languages import iso_language
from pomelo.pricing import Used
from pomelo.tasks.base import Bound, Folding, Heard, TaskKind, nothing
from pomelo.tasks.ranges import known, within
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


def bound(given: SpeechToTextInput, model: Model, route: Route, heard: Heard) -> Bound:
    """The length of the audio; in the end the provider reports it."""
    used = Used(audio_ms=heard.most(model))
    return Bound(used, used, heard_ms=heard.ms)


class TranscriptionFold:
    """Keeps the one result."""

    __slots__ = ("_folding", "_transcription")

    def __init__(self, folding: Folding) -> None:
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
        result.transcription.CopyFrom(self._transcription)
        result.transcription.language = iso_language(self._transcription.language)
        return None

    def used(self) -> tuple[Used, bool]:
        """See Fold."""
        bound = self._folding.bound
        seconds = self._transcription.audio_seconds if self._transcription is not None else 0.0
        ms = ceil(seconds * 1000)
        if 0 < ms <= bound.most.audio_ms:
            return Used(audio_ms=ms), True
        # The provider reported no length, as for silence, or more than is possible.
        if ms > bound.most.audio_ms:
            log.warning("a provider reported %d ms of audio that has at most %d", ms, bound.most.audio_ms)
        return Used(audio_ms=min(bound.heard_ms, bound.most.audio_ms) or bound.most.audio_ms), False

    def close(self) -> None:
        """See Fold."""


KIND = TaskKind("speech_to_text", "speech_", check, TranscriptionFold, bound, nothing, audio=True)
