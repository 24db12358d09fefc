"""Operations of OpenAI's API in the OpenAPI description: their requests, responses, events and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.openai.parameters import Values
from gateway.openapi.schema import JSON, TASK_HEADERS, Schema, closed, object_of, operation, ref, responses
from gateway.openapi.tasks import TASK_ERRORS, TASK_PARAMETERS
from gateway.types import TASK_FORMATS
from gateway.types.fields import describe
from pomelo.errors import TABLE
from pomelo.gen.v1.task_pb2 import TaskType

SSE = "text/event-stream"

_TEXT = TASK_FORMATS[TaskType.TASK_TYPE_TEXT]
USER = describe(_TEXT.rules["user"], _TEXT.fields["user"].schema)
SAFETY_IDENTIFIER = USER | {"description": "Replaces user."}

_ERROR = {
    "message": {"type": "string", "description": "What is wrong, with which parameter, and what to do."},
    "type": {"enum": sorted({row.type for row in TABLE.values()})},
    "param": {"type": ["string", "null"], "description": "The parameter at fault."},
    "code": {"enum": list(TABLE)},
}
ERROR = closed({"error": closed(_ERROR)})


def task_operation(
    operation_id: str, summary: str, request: Schema, ok: Mapping[str, Any], description: str = ""
) -> Schema:
    """Returns an operation that runs a task. `request` and `ok` are contents by media type."""
    done = responses(ok, *TASK_ERRORS, more=TASK_HEADERS, openai=True)
    described = operation(operation_id, summary, done, *TASK_PARAMETERS, request=request)
    if description:
        described["post"]["description"] = description
    return described


def events(schema: str, *, names: Sequence[str] = ()) -> Schema:
    """Returns the content of a stream of events with the data `schema`. Either they have `names`, or an end
    marker follows them."""
    data: Schema = {"type": "string", "contentMediaType": JSON, "contentSchema": ref(schema)}
    if names:
        return {"schema": object_of({"event": {"enum": list(names)}, "data": data})}
    return {"schema": object_of({"data": {"anyOf": [{"const": "[DONE]"}, data]}})}


def only(values: Values) -> dict[str, Schema]:
    """Returns the schemas of parameters that may only have these values, which change nothing."""
    return {name: _only(accepted) for name, accepted in values.items()}


def without_effect(values: Values) -> dict[str, Schema]:
    """Returns the schemas of parameters that have no effect."""
    return {name: {"description": "No effect. Listed in X-Pomelo-Adjusted."} for name in values}


def example(title: str, **body: Any) -> Schema:
    """Returns an example of a request, by its title."""
    return {title: {"summary": title, "value": body}}


def nullable(schema: Schema) -> Schema:
    """Returns the schema of a parameter that may also be null."""
    return {"anyOf": [schema, {"type": "null"}]}


def task_properties(task: Schema, *names: str) -> dict[str, Schema]:
    """Returns the schemas of fields of a task that have the same name here."""
    return {name: task["properties"][name] for name in names}


def _only(accepted: Any) -> Schema:
    values = list(accepted)
    if all(type(value) is str for value in values):
        return {"enum": [*values, None]}
    if type(values[0]) is list:
        return {"type": ["array", "null"], "items": {"type": "string", "enum": values[0]}}
    return nullable({"const": values[0]})
