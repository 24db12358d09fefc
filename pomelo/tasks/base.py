"""The definition of a task type: how its input is checked and estimated, and how events become its output.

A task's usage is computed three times: before it runs, as an estimate with a maximum; at its end, from the
provider's count or Pomelo's; and for an answer that ended early, from the part that was delivered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomelo.catalog.catalog import ENCODER_PADDING_MS, Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.catalog.reported_cost import Report
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.media.writer import MediaWriter
from pomelo.values import value_type

LARGE = 256 * 1024
"""Bytes of text from which on what takes long is done in a thread, so that other tasks don't wait for it."""

MAX_INLINE_DEFAULT = 3 * 1024 * 1024
"""Bytes of a media file that an answer contains inline if the caller set no MediaDelivery."""

MAX_INLINE_STREAM_DEFAULT = 45 * 1024
"""The same for a stream: as base64 they make a line of less than 64 KiB, which every client can read."""

MAX_INLINE = 16 * 1024 * 1024
"""Bytes of a media file that an answer contains inline at most; a larger file has only a link."""

MAX_INLINE_FALLBACK = MAX_INLINE_DEFAULT
"""Bytes of a media file that an answer contains inline, in place of a link, if the file can't be stored:
every client accepts an answer of that size."""


def max_inline(delivery: MediaDelivery.ValueType, *, stream: bool) -> int:
    """The maximum bytes of a media file that an answer, or the last event of a stream, contains inline."""
    if delivery == MediaDelivery.MEDIA_DELIVERY_LINK:
        return 0
    if delivery:
        return MAX_INLINE
    return MAX_INLINE_STREAM_DEFAULT if stream else MAX_INLINE_DEFAULT


MIN_BYTES_PER_SECOND = 125
"""Assumed for audio that can't be measured: 1 kbit/s, below every encoding in use."""


@value_type(frozen=True, slots=True)
class AudioInfo:
    """Input audio: its size in bytes and its measured length in milliseconds, 0 if it can't be measured."""

    size: int = 0
    ms: int = 0

    def max_ms(self, model: Model) -> int:
        """The maximum length of the audio in milliseconds.

        A vendor may count up to 2 % more than was measured. Audio that can't be measured is assumed to have
        the densest encoding.
        """
        limit = model.limits.max_audio_seconds * 1000
        max_ms = -(-self.ms * 102 // 100) if self.ms else -(-self.size * 1000 // MIN_BYTES_PER_SECOND)
        return min(max_ms, limit) if limit else max_ms

    def exceeds(self, model: Model) -> bool:
        """Whether the measured length exceeds the model's limit by more than the padding of encoders."""
        limit = model.limits.max_audio_seconds * 1000
        return bool(limit) and self.ms > limit + ENCODER_PADDING_MS


class InputCount:
    """Returns Pomelo's own count of the tokens of an input, which `count` counts at the first call: most
    tasks never need it, and counting takes longer than all other work on a long text. `size` is the bytes of
    the text."""

    __slots__ = ("_count", "_size", "_tokens")

    def __init__(self, count: Callable[[], int], size: int = 0) -> None:
        self._count = count
        self._size = size
        self._tokens: int | None = None

    @property
    def is_slow(self) -> bool:
        """Whether the next call belongs in a thread, because it counts a long text."""
        return self._size > LARGE and self._tokens is None

    def __call__(self) -> int:
        if self._tokens is None:
            self._tokens = self._count()
        return self._tokens


_NO_TOKENS = InputCount(lambda: 0)


@value_type(frozen=True, slots=True)
class Estimate:
    """The minimum and the maximum usage of a task. They differ if its output may be cut to what the account
    can pay; `sufficient` is the usage that it should be allowed even if other tasks then can't run.

    `tokens` is the likely use, for the tokens-per-minute limit. `exact`: the task uses exactly this.
    `possible_input_tokens` are the most that any vendor can count for its text, whatever the model's limit.
    `count_input` returns Pomelo's own count for a text, used if the vendor reports none. `input_audio_ms` is
    the measured length of the input audio, 0 if unknown.
    """

    minimum: Usage
    maximum: Usage
    sufficient: Usage | None = None
    tokens: int = 0
    possible_input_tokens: int = 0
    exact: bool = False
    count_input: InputCount = _NO_TOKENS
    input_audio_ms: int = 0

    @property
    def likely_audio_ms(self) -> int:
        """The length of the input audio as it was measured; the maximum if it is unknown."""
        return min(self.input_audio_ms, self.maximum.audio_ms) or self.maximum.audio_ms


@value_type(frozen=True, slots=True)
class CollectorContext:
    """The task that a collector serves: its input, model and estimate, and whether it is streamed.

    `delivery` is how its result contains media, `report` what its provider reports beside the events, and
    `writer` opens a media file of a content type. `keep`: the answer is stored, so that it can be repeated.
    """

    input: Any
    model: Model
    estimate: Estimate
    stream: bool
    delivery: MediaDelivery.ValueType
    report: Report
    writer: Callable[[str], MediaWriter]
    keep: bool = False


class Collector(ABC):
    """Collects the events of one task into its result, and counts what it used."""

    __slots__ = ("must_count", "output_bytes")

    def __init__(self) -> None:
        self.must_count = False
        """Whether `count` must be called between `finish` and `usage`, in a thread because it takes long."""
        self.output_bytes = 0
        """Bytes of output so far: those that a stream passed on. A text counts them in a whole answer,
        too."""

    @abstractmethod
    def add(self, event: TaskEvent) -> TaskEvent | None:
        """Adds an event; returns the event that a stream passes on now, None if it is kept until the end. A
        whole answer passes nothing on, whatever this returns.

        Raises:
            PomeloError: provider_failed, store_unavailable; payload_too_large (the caller's media).
        """

    @abstractmethod
    def finish(self, result: TaskResult) -> None:
        """Writes the output into `result`: in a stream without `keep` it may lack what events have contained.

        Raises:
            PomeloError: provider_failed: the output is incomplete; store_unavailable, payload_too_large.
        """

    def end_stream(self, result: TaskResult) -> Iterable[TaskEvent]:
        """Removes from a stream's result what its events have contained. Returns events with the output that
        none has contained, to be sent before the last one."""
        return ()

    def count(self) -> None:  # noqa: B027 (few collectors count)
        """Counts what the task used, from its input and output; or writes the output, if that takes long."""

    @abstractmethod
    def usage(self, task_input: Any) -> tuple[Usage, bool]:
        """The usage of the finished task, and whether it is the provider's count or exact. `task_input` is
        the input as its provider got it: a later route than the context's may have served the task."""

    def partial_usage(self, task_input: Any) -> Usage:
        """The usage of a stream that ends early, from what it passed on; none for an output that is delivered
        completely or not at all. `task_input` is the input as its provider got it."""
        return Usage()

    def close(self) -> None:  # noqa: B027 (few collectors hold something)
        """Frees resources, finished or not; idempotent."""


def estimate_audio(task_input: Any, model: Model, route: Route, audio: AudioInfo) -> Estimate:
    """The maximum length of the input audio, for task types that are billed by it."""
    usage = Usage(audio_ms=audio.max_ms(model))
    return Estimate(usage, usage, input_audio_ms=audio.ms)


def no_media(task_input: Any, estimate: Estimate) -> int:
    """The media size of an answer without media: 0."""
    return 0


def no_files(task_input: Any) -> Iterable[str]:
    """The files of an input that names none."""
    return ()


def replay_result(result: TaskResult, audio: Path | None) -> Iterator[TaskEvent]:
    """The events of an output that is one event."""
    yield TaskEvent(completed=result)


ReadMedia = Callable[[str, str], bytes]
"""Returns the bytes of a stored file of the caller, by its id. The second argument is the field that has it.

Raises:
    PomeloError: invalid_parameter; payload_too_large if a task's files are too large; store_unavailable.
"""


@dataclass(frozen=True, slots=True)
class TaskDefinition:
    """A task type, and what differs between task types.

    `name` is the field of TaskSpec.input and the name of the providers' method. `check` raises `PomeloError`
    for an input that the model can't take, and replaces images by `data:` URIs. `estimate` estimates the
    usage of an input that is fitted to a route. `collector` creates the collector of a task. `output_size`
    returns the bytes of a result's output, or of the file that it links to. `replay` yields the events of a
    stored result after the first; `audio` is the file of its audio. `counts_tokens`: the tokens-per-minute
    limit applies. `limit_output` returns the maximum output of an input when the reservation pays for that
    many tokens, None if the model's own maximum applies; for task types whose output can be shortened.
    `audio`: the input contains audio. `media_size` estimates the maximum bytes of media in the answer.
    `files` returns the ids of the files that `check` reads.
    """

    name: str
    id_prefix: str
    check: Callable[[Any, Model, ReadMedia], None]
    estimate: Callable[[Any, Model, Route, AudioInfo], Estimate]
    collector: Callable[[CollectorContext], Collector]
    output_size: Callable[[TaskResult], int]
    replay: Callable[[TaskResult, Path | None], Iterator[TaskEvent]] = replay_result
    counts_tokens: bool = False
    limit_output: Callable[[Any, Estimate, int], int | None] | None = None
    audio: bool = False
    media_size: Callable[[Any, Estimate], int] = no_media
    files: Callable[[Any], Iterable[str]] = no_files
