"""The operation that runs tasks in the OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.openapi.schema import (
    JSON,
    TASK_HEADERS,
    Models,
    Schema,
    Section,
    closed,
    object_of,
    operation,
    parameter,
    ref,
    responses,
    union,
)
from gateway.types import TASK_FORMATS
from gateway.types.fields import describe
from pomelo.audio_formats import AUDIO_FORMATS
from pomelo.errors import NOT_UNDER_API, TABLE

BINARY: Mapping[str, Any] = {"schema": {"type": "string", "format": "binary"}}
"""The content of a response that is a file."""

_AUDIO = {
    "minLength": 2,
    "description": "Audio as base64, or as a data: URI; in a form, also as a file.",
}
_JSON_EVENT = {"type": "string", "contentMediaType": JSON, "contentSchema": ref("TaskEvent")}
CODES = tuple(code for code in TABLE if code not in NOT_UNDER_API)
TASK_ERRORS = tuple(code for code in CODES if code not in ("not_found", "method_not_allowed"))
AUDIO_TYPES = (
    *dict.fromkeys(each.content_type.partition(";")[0] for each in AUDIO_FORMATS.values()),
    "audio/*",
)
"""The media types of speech, without parameters. Vendors may send another type than they were asked for."""


TASK_PARAMETERS = [
    parameter(
        "X-Request-Id",
        "header",
        {"type": "string", "pattern": "^[!-~]{1,128}$"},
        "Your id of the request; one is made if it is absent.",
    ),
    parameter(
        "Idempotency-Key",
        "header",
        {"type": "string", "pattern": "^[!-~]{1,255}$"},
        "A unique name of the request: if it is sent again within 24 hours, the first response is returned.",
    ),
    parameter(
        "Prefer",
        "header",
        {"type": "string"},
        "handling=strict (RFC 7240): a field that the model does not accept as it is is refused with "
        "invalid_parameter. By default it is adjusted, and listed in X-Pomelo-Adjusted.",
    ),
    parameter(
        "X-Request-Timeout",
        "header",
        {"type": "number", "minimum": 1, "maximum": 600, "default": 600},
        "Seconds that the task may take; fractions and values below 1 are accepted.",
    ),
]
"""The headers of a request that runs a task."""

_DESCRIPTION = """\
The model decides the type of task, and so which other fields the body may have.

With `"stream": true` the response is `text/event-stream`: each event is a line `data: ` with a JSON object \
(`TaskEvent`), then an empty line. After the last object comes `data: [DONE]`. A failure after the first \
object is `event: error` with the error as its data, and no `[DONE]` follows: only a stream that ends with \
`[DONE]` is complete. Lines that begin with a colon are comments.

```
data: {"id":"task_01","object":"task.completion.chunk","created":1234567890,"model":"gpt-4",\
"choices":[{"index":0,"delta":{"role":"assistant","content":"Paris"},"finish_reason":null}]}

data: [DONE]
```

With `Accept: audio/*` or `image/*` the response is the file itself, sent as it arrives."""


def section(models: Models) -> Section:
    """Describes the operation; `models` are the models by name."""
    ok = {
        JSON: {"schema": ref("TaskResult"), "examples": _result_examples()},
        "text/event-stream": {"schema": ref("StreamEvent")},
        **dict.fromkeys(("image/png", "image/jpeg", "image/webp", *AUDIO_TYPES), BINARY),
    }
    run = operation(
        "runTask",
        "Run a task; the model decides its type.",
        responses(ok, *TASK_ERRORS, more=TASK_HEADERS),
        *TASK_PARAMETERS,
        description=_DESCRIPTION,
        request={
            JSON: {"schema": ref("Task"), "examples": _request_examples(models)},
            "multipart/form-data": {"schema": ref("Form")},
        },
    )
    return Section("Tasks", "Text, images and speech.", {"/api/v1/task": run}, _schemas(models))


def model_name(models: Models, *task_types: int) -> Schema:
    """Returns the schema of a model's name: one of `models` with one of `task_types`; any, if none has."""
    names = sorted(name for name, model in models.items() if model.task_type in task_types)
    return {"type": "string", "enum": names} if names else {"type": "string"}


def task_schema(task_type: int, models: Models) -> Schema:
    """Returns the schema of the body of a task for `models`."""
    task_format = TASK_FORMATS[task_type]
    most = max((each.max_characters for each in models.values() if each.task_type == task_type), default=0)
    properties: Schema = {
        "model": {
            **model_name(models, task_type),
            "examples": [task_format.example_model],
            "description": "Decides the type of task.",
        },
        "stream": {"type": ["boolean", "null"], "default": False},
    }
    for name, rule in task_format.rules.items():
        field = task_format.fields.get(name)
        properties[name] = describe(rule, _AUDIO if field is None else field.schema, most)
    for name, field in task_format.fields.items():
        if name not in task_format.rules and field.schema:
            properties[name] = field.schema
    required = (name for name, rule in task_format.rules.items() if rule.required)
    return closed(properties, ("model", *required))


def _form(model: Schema) -> Schema:
    properties: Schema = {
        name: {"type": "string"} for each in TASK_FORMATS.values() for name in each.fields
    }  # All fields of a form are text; objects and lists are JSON text.
    properties |= {
        "model": {**model, "examples": ["eleven-labs-stt"]},
        "stream": {"type": "string", "enum": ["true", "false"]},
        "audio": {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"},
    }
    return closed(
        properties,
        ["model"],
        description="Fields of the model's task type; others are refused. Objects and lists are JSON text.",
    )


def _schemas(models: Models) -> dict[str, Schema]:
    schemas: dict[str, Schema] = {}
    for task_type, each in TASK_FORMATS.items():
        schemas[each.schema_name] = task_schema(task_type, models)
        schemas |= each.schemas
    by_model = {
        name: TASK_FORMATS[model.task_type].schema_name
        for name, model in sorted(models.items())
        if model.task_type in TASK_FORMATS
    }
    if not by_model:  # of a task type, an example is known
        by_model = {each.example_model: each.schema_name for each in TASK_FORMATS.values()}
    results = {each.result_schema_name: None for each in TASK_FORMATS.values()}
    by_object = {schemas[name]["properties"]["object"]["const"]: name for name in results}
    events = dict.fromkeys(
        name
        for each in TASK_FORMATS.values()
        for name in each.stream_schema_names or (each.result_schema_name,)
    )
    return {
        "Task": union("A task; the model decides its type.", by_model, "model"),
        "TaskResult": union("The result of a task.", by_object, "object"),
        "TaskEvent": {
            "description": "The data of an event of a stream. `Error` is that of the event `error`.",
            "oneOf": [ref(name) for name in (*events, "Error")],
        },
        "StreamEvent": object_of(
            {
                "event": {"enum": ["message", "error"], "default": "message"},
                "data": {"anyOf": [{"const": "[DONE]"}, _JSON_EVENT]},
            },
            ["data"],
            description="A server-sent event.",
        ),
        **schemas,
        "Form": _form(model_name(models, *TASK_FORMATS)),
    }


def _request_examples(models: Models) -> Schema:
    """Returns the examples whose models are among `models`, or all if those are unknown."""
    return {
        title: {"summary": title, "value": dict(body)}
        for each in TASK_FORMATS.values()
        for title, body in each.examples.items()
        if not models or body["model"] in models
    }


def _result_examples() -> Schema:
    examples = {}
    for each in TASK_FORMATS.values():
        if each.result_example:
            schema = each.schemas[each.result_schema_name]["properties"]
            common = {
                "id": schema["id"]["pattern"].removeprefix("^") + "01",
                "object": schema["object"]["const"],
                "created": 1234567890,
                "model": each.example_model,
            }
            examples[each.result_schema_name] = {
                "summary": schema["object"]["const"],
                "value": common | dict(each.result_example),
            }
    return examples
