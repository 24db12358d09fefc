"""What a kind of task is: how its input is checked and bounded, and how events become its output.

What a task uses is told three times: before it runs, as a bound that it can't exceed; at its end, by the
provider's count or ours; and for an answer that was cut or left, from what was delivered of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pomelo.catalog.catalog import ENCODER_PADDING_MS, Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.media.store import MediaWriter

MAX_INLINE_DEFAULT = 3 * 1024 * 1024
"""Bytes of a medium that ride in an answer when the caller did not say how it should come back."""

MAX_INLINE_STREAM_DEFAULT = 45 * 1024
"""The same for a stream: as base64 they make a line of less than 64 KiB, which every client can read."""

MAX_INLINE = 16 * 1024 * 1024
"""Bytes of a medium that ride in an answer at all; above it there is a link alone, whatever was asked for."""


MAX_INLINE_FALLBACK = MAX_INLINE_DEFAULT
"""The most bytes of a media file that an answer contains inline, in place of a link, when the file
can't be stored: every client accepts an answer of that size."""


def max_inline(wanted: ResponseFormat.ValueType, *, stream: bool) -> int:
    """Bytes of a medium that ride in an answer, or in the last event of a stream, when `wanted` was asked
    for."""
    if wanted == ResponseFormat.RESPONSE_FORMAT_URL:
        return 0
    if wanted:
        return MAX_INLINE
    return MAX_INLINE_STREAM_DEFAULT if stream else MAX_INLINE_DEFAULT


MIN_BYTES_PER_SECOND = 125
"""Bytes of a second of audio that can't be measured: less than any such encoding in use has (1 kbit/s)."""


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """Input audio: its size in bytes and its measured length in milliseconds (0: it can't be
    measured)."""

    size: int = 0
    ms: int = 0

    def max_ms(self, model: Model) -> int:
        """The longest that the audio can be, in milliseconds.

        A vendor may count up to 2 % more than was measured. Audio that can't be measured is assumed
        to have the densest encoding.
        """
        limit = model.limits.max_audio_seconds * 1000
        most = -(-self.ms * 102 // 100) if self.ms else -(-self.size * 1000 // MIN_BYTES_PER_SECOND)
        return min(most, limit) if limit else most

    def exceeds(self, model: Model) -> bool:
        """Whether it was measured to be longer than the model takes, beyond what encoders add."""
        limit = model.limits.max_audio_seconds * 1000
        return bool(limit) and self.ms > limit + ENCODER_PADDING_MS


@dataclass(frozen=True, slots=True)
class Estimate:
    """The least and the most that a task can use. They differ if its output may be cut to what the
    account can pay; `enough` is what it should be able to use even if other tasks then can't run.
    `tokens` is the likely use, for the tokens-per-minute limit. `exact`: the task uses exactly this.
    `input_tokens` is Pomelo's own count for a text, used if the vendor reports none; `heard_ms` is the
    measured length of input audio (0: unknown).
    """

    minimum: Usage
    maximum: Usage
    sufficient: Usage | None = None
    tokens: int = 0
    exact: bool = False
    input_tokens: int = 0
    heard_ms: int = 0


@dataclass(slots=True)
class Progress:
    """What has gone out of an answer: bytes, and pieces that had any. `reported` is what the provider has
    said so far that the input was, None before it has. `audio_ms` is the measured length of audio, None if it
    can't be measured."""

    size: int = 0
    pieces: int = 0
    reported: Usage | None = None
    audio_ms: int | None = None


class Collector(Protocol):
    """Gathers one task's events into its result; one for each task."""

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        """Takes in an event; gives back what a stream passes on now, None where it is held until the end.

        Raises:
            PomeloError: provider_failed, store_unavailable; payload_too_large: the caller's media
                have reached their limit.
        """
        ...

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        """Puts the output into `result`; gives back what was held of a text stream.

        For other kinds it gives None, and the stream ends with `result`.

        Raises:
            PomeloError: provider_failed when the output is not complete; store_unavailable,
                payload_too_large as above.
        """
        ...

    def used(self) -> tuple[Usage, bool]:
        """What the finished task used, and whether the provider counted it."""
        ...

    def close(self) -> None:
        """Frees what it holds, finished or not; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class CollectorContext:
    """What a fold is made for: the task's input, model and bound, whether a stream is wanted, where media go,
    and whether media are kept even when the caller wants no link. Whoever passes a stream on counts in
    `delivered` what has gone out."""

    input: Any
    model: Model
    bound: Estimate
    stream: bool
    writer: Callable[[str], MediaWriter]
    keep: bool = False
    delivered: Progress = field(default_factory=Progress)


def no_media(given: Any, bound: Estimate) -> int:
    """The media size of an answer without media."""
    return 0


@dataclass(frozen=True, slots=True)
class TaskDefinition:
    """One row of the table of kinds.

    `name` is the field of Task.input and the name of the providers' method. `check` raises `PomeloError`
    for an input that the model can't be asked; `bound` returns what an input can use on a route that
    it is fitted to; `partly` returns what was used by an answer that ended early, from what was delivered.
    `audio` is whether the input contains audio. `media_size` estimates the most bytes of media in
    the answer, 0 if it has none.
    """

    name: str
    id_prefix: str
    check: Callable[[Any, Model], None]
    fold: Callable[[CollectorContext], Collector]
    bound: Callable[[Any, Model, Route, AudioInfo], Estimate]
    partly: Callable[[Any, Estimate, Progress], Usage]
    audio: bool = False
    media_size: Callable[[Any, Estimate], int] = no_media


def no_usage(given: Any, bound: Estimate, delivered: Progress) -> Usage:
    """Of an answer that comes whole or not at all."""
    return Usage()
