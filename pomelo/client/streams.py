"""What the streams of both clients have in common: the pieces of the output, and the result at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from pomelo.client.errors import IncompleteStream
from pomelo.client.tasks import Task
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult

C = TypeVar("C")
T = TypeVar("T")
R = TypeVar("R")


class StreamState(Generic[C, T, R]):
    def __init__(self, client: C, task: Task[T, R]) -> None:
        self._client = client
        self._task = task
        self._reader = task.reader()
        self._rpc: Any = None
        self._first: Any = None
        self._completed: TaskResult | None = None
        self._result: R | None = None
        self._left = False
        """Whether the block was left."""

    @property
    def result(self) -> R:
        """The result, after the last piece.

        Raises:
            IncompleteStream: the stream has not been read to its end.
        """
        if self._result is None:
            raise IncompleteStream("The stream has not been read to its end")
        return self._result

    def _check_unopened(self) -> None:
        """Checks that the stream was not opened before: it would add to the output that it has read.

        Raises:
            RuntimeError: it was.
        """
        if self._rpc is not None:
            raise RuntimeError(
                "A stream can be opened once. To run the task again, call the client's method again"
            )

    def _is_over(self) -> bool:
        """Returns whether the stream has been read to its end.

        Raises:
            IncompleteStream: the block was left before.
        """
        if self._result is not None:
            return True
        if self._left:
            raise IncompleteStream("The block of the stream was left before its end") from None
        return False

    def _read(self, event: TaskEvent) -> T | None:
        if event.HasField("completed"):
            self._completed = event.completed
        return self._reader.read(event)

    def _finish(self, metadata: Mapping[str, str]) -> None:
        if self._completed is None:
            raise IncompleteStream("The server ended the stream before the task was complete. Try again")
        self._result = self._reader.result(self._completed, metadata)
