"""Moderation: `moderation.result` objects."""

from __future__ import annotations

from pydantic_core import to_json

from gateway.types import fields
from gateway.types.base import Link, TaskFormat, open_object, result_schema
from pomelo.fields import MODERATION_FIELDS
from pomelo.gen.v1.task_pb2 import TaskResult


def render_result(result: TaskResult, link: Link) -> bytes:
    """Returns a `moderation.result` object."""
    return (
        open_object(result, "moderation.result") + b',"flagged":' + to_json(result.moderation.flagged) + b"}"
    )


FORMAT = TaskFormat(
    name="moderation",
    input="moderation",
    output="moderation",
    schema_name="ModerationTask",
    result_schema_name="ModerationResult",
    schemas={"ModerationResult": result_schema("moderation.result", "mod", flagged={"type": "boolean"})},
    example_model="moderator",
    rules=MODERATION_FIELDS,
    fields=fields.by_name(fields.text("text")),
    render_result=render_result,
)
