"""What the streams of both clients have in common: the pieces of the output, and the result at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from pomelo.client.errors import IncompleteStream
from pomelo.client.results import Reader
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult

T = TypeVar("T")
R = TypeVar("R")


class StreamState(Generic[T, R]):
    def __init__(self, reader: Reader[T, R]) -> None:
        self._reader = reader
        self._completed: TaskResult | None = None
        self._result: R | None = None

    @property
    def result(self) -> R:
        """The result, after the last piece.

        Raises:
            IncompleteStream: the stream has not been read to its end.
        """
        if self._result is None:
            raise IncompleteStream("The stream has not been read to its end")
        return self._result

    def _read(self, event: TaskEvent) -> T | None:
        if event.HasField("completed"):
            self._completed = event.completed
        return self._reader.read(event)

    def _finish(self, metadata: Mapping[str, str]) -> None:
        if self._completed is None:
            raise IncompleteStream("The server ended the stream before the task was complete. Try again")
        self._result = self._reader.result(self._completed, metadata)
