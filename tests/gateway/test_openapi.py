"""The OpenAPI description is complete; the fault tests check that it is correct."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.openapi.document import document
from gateway.routes import OPEN_ROUTES, ROUTES
from gateway.types import COMMON_FIELDS, TASK_FORMATS
from pomelo.errors import TABLE
from pomelo.fields import FIELD_RULES, FieldRule
from pomelo.gen.v1.task_pb2 import TaskType


def test_every_route_every_field_and_every_error_of_a_task_is_described() -> None:
    described = document("")
    paths = {(method.upper(), path) for path, ops in described["paths"].items() for method in ops}
    assert paths == {*ROUTES, ("GET", "/media/{media_id}")}
    assert set(OPEN_ROUTES) == {"/media/{media_id}", "/openapi.json", "/healthz"}
    answers = described["paths"]["/api/v1/task"]["post"]["responses"]
    described_codes = {code for response in answers.values() for code in response["description"].split(", ")}
    assert described_codes >= set(TABLE) - {"not_found", "method_not_allowed"}
    form = described["components"]["schemas"]["Form"]["properties"]
    assert set(form) == {"model", "stream", "audio"}.union(*(each.fields for each in TASK_FORMATS.values()))


SCHEMAS = document("")["components"]["schemas"]


def described_rules(schema: dict[str, Any]) -> dict[str, FieldRule]:
    """The rules that the schema of an object describes, by field; without the fields of every task type."""
    fields = {name: each for name, each in schema["properties"].items() if name not in COMMON_FIELDS}
    return {name: described_rule(each, name in schema["required"]) for name, each in fields.items()}


def described_rule(schema: dict[str, Any], required: bool) -> FieldRule:
    """The rule that a field's schema describes."""
    if "anyOf" in schema:
        reference, null = schema["anyOf"]
        assert null == {"type": "null"}
        name = reference["$ref"].removeprefix("#/components/schemas/")
        return FieldRule("object", required, fields=described_rules(SCHEMAS[name]))
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    choices = schema.get("enum", ())
    assert ("null" in types) is not required
    assert not choices or (None in choices) is not required
    if required:
        assert schema["minItems" if "array" in types else "minLength"] >= 1
    return FieldRule(
        type=[each for each in types if each != "null"][-1],
        required=required,
        minimum=schema.get("minimum"),
        maximum=schema.get("maximum"),
        max_length=schema.get("maxLength"),
        max_items=schema.get("maxItems"),
        choices=tuple(each for each in choices if each is not None),
        default=schema.get("default"),
    )


@pytest.mark.parametrize("task_type", FIELD_RULES)
def test_every_field_is_described_with_its_rule(task_type: TaskType.ValueType) -> None:
    schema = SCHEMAS[TASK_FORMATS[task_type].schema_name]
    assert described_rules(schema) == FIELD_RULES[task_type]
    assert schema["properties"].keys() >= COMMON_FIELDS
    assert set(schema["required"]) >= {"model"}
