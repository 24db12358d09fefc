"""OpenAI's published schemas of the answers under /v1, in `openai_schemas.json`.

`python -m tests.sdk.published openapi.json` makes that file from the one of github.com/openai/openai-openapi, which is
under the MIT licence in `openai_schemas.LICENSE`: only the schemas that are used, without descriptions.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs

FILE = Path(__file__).with_name("openai_schemas.json")

ANSWERS = (
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "ListModelsResponse",
    "Model",
    "Response",
    "ResponseStreamEvent",
    "ErrorResponse",
    "ImagesResponse",
    "ImageGenStreamEvent",
    "CreateSpeechResponseStreamEvent",
    "CreateTranscriptionResponseJson",
    "CreateTranscriptionResponseVerboseJson",
    "CreateTranscriptionResponseStreamEvent",
)
"""The names of the schemas of answers."""

_TEXTS = {"description", "title", "example", "examples", "discriminator", "externalDocs"}
_REFERENCE = "#/components/schemas/"


def errors(name: str, answer: Any) -> list[str]:
    """Returns what is wrong with an answer by the schema of that name."""
    return [f"{error.instance_path}: {error.message}"[:300] for error in _validator(name).iter_errors(answer)]


@cache
def _validator(name: str) -> Any:
    return jsonschema_rs.validator_for({"$ref": _REFERENCE + name, **json.loads(FILE.read_text())})


def _without_texts(schema: Any, *, is_map: bool = False) -> Any:
    """Returns a schema without texts, and with `nullable` in the words of JSON Schema; `is_map`: it is a map of schemas
    by the names of members."""
    if isinstance(schema, list):
        return [_without_texts(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        name: _without_texts(value, is_map=not is_map and name == "properties")
        for name, value in schema.items()
        if is_map or not (name in _TEXTS or name.startswith("x-"))
    }
    if not is_map and kept.pop("nullable", False):
        return {"anyOf": [kept, {"type": "null"}]}
    return kept


def _references(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_references, schema))
    if not isinstance(schema, dict):
        return set()
    found = set().union(*map(_references, schema.values()))
    reference = schema.get("$ref")
    return found | ({reference.removeprefix(_REFERENCE)} if isinstance(reference, str) else set())


def _extract(published: Path) -> None:
    """Writes the schemas of answers, and those that they refer to."""
    schemas = json.loads(published.read_text())["components"]["schemas"]
    found: dict[str, Any] = {}
    names = set(ANSWERS)
    while names:
        name = names.pop()
        found[name] = _without_texts(schemas[name])
        names |= _references(found[name]) - found.keys()
    lines = [f"{json.dumps(name)}:{json.dumps(schema)}" for name, schema in sorted(found.items())]
    FILE.write_text('{"components":{"schemas":{\n' + ",\n".join(lines) + "\n}}}\n")


if __name__ == "__main__":
    _extract(Path(sys.argv[1]))
