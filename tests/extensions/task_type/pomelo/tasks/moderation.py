"""Moderation tasks: whether a text breaks the vendor's rules."""

from __future__ import annotations

from typing import Any

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.fields import check_required_text
from pomelo.gen.v1.moderation_pb2 import ModerationInput, ModerationOutput
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.tasks.base import AudioInfo, Collector, CollectorContext, Estimate, ReadMedia, TaskDefinition


def check(task_input: ModerationInput, model: Model, read_media: ReadMedia) -> None:
    """Refuses an input that no moderation model takes.

    Raises:
        PomeloError: missing_parameter, context_length_exceeded.
    """
    check_required_text(task_input, "text", model.limits.max_characters)


def estimate(task_input: ModerationInput, model: Model, route: Route, audio: AudioInfo) -> Estimate:
    """The characters of the text."""
    usage = Usage(characters=len(task_input.text))
    return Estimate(usage, usage, exact=True)


class ModerationCollector(Collector):
    """Keeps the judgement until the end."""

    __slots__ = ("_context", "_output")

    def __init__(self, context: CollectorContext) -> None:
        super().__init__()
        self._context = context
        self._output: ModerationOutput | None = None

    def add(self, event: TaskEvent) -> TaskEvent | None:
        self._output = event.completed.moderation
        return None

    def finish(self, result: TaskResult) -> None:
        if self._output is None:
            raise PomeloError("provider_failed")
        result.moderation.CopyFrom(self._output)

    def usage(self, task_input: Any) -> tuple[Usage, bool]:
        return self._context.estimate.maximum, True


DEFINITION = TaskDefinition("moderation", "mod_", check, estimate, ModerationCollector, lambda result: 1)
