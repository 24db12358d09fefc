"""What a kind of task is: how its input is checked, and how a provider's events become its output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pomelo.catalog import Model
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.media import MediaWriter

UNASKED_MOST = 3 * 1024 * 1024
"""Bytes of a medium that ride in an answer when the caller did not say how it should come back."""

INLINE_MOST = 16 * 1024 * 1024
"""Bytes of a medium that ride in an answer at all; above it there is a link alone, whatever was asked for."""


def inline_most(wanted: "ResponseFormat.ValueType") -> int:
    """Bytes of a medium that ride in an answer when `wanted` was asked for."""
    if wanted == ResponseFormat.RESPONSE_FORMAT_URL:
        return 0
    return INLINE_MOST if wanted else UNASKED_MOST


class Fold(Protocol):
    """Gathers one task's events into its result; one for each task."""

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        """Takes in an event; gives back what a stream passes on now, None where it is held until the end.

        Raises:
            PomeloError: provider_failed, store_unavailable.
        """
        ...

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        """Puts the output into `result`; gives back what was held of a text stream.

        For other kinds it gives None, and the stream ends with `result`.

        Raises:
            PomeloError: provider_failed when the output is not complete; store_unavailable.
        """
        ...

    def close(self) -> None:
        """Frees what it holds, finished or not; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Folding:
    """What a fold is made for: the task's input, whether a stream is wanted, and where media go."""

    input: Any
    stream: bool
    writer: Callable[[str], MediaWriter]


@dataclass(frozen=True, slots=True)
class TaskKind:
    """One row of the table of kinds.

    `name` is the field of Task.input and the name of the providers' method. `check` raises `PomeloError`
    for an input that the model can't be asked; `audio` tells whether the input has a sound.
    """

    name: str
    id_prefix: str
    check: Callable[[Any, Model], None]
    fold: Callable[[Folding], Fold]
    audio: bool = False
