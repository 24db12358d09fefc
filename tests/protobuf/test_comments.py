"""The comments of the proto files state the ranges, limits and defaults of the table of field rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway.types import TASK_FORMATS
from pomelo.errors import PomeloError
from pomelo.fields import (
    MAX_CALL_CHARACTERS,
    MAX_METADATA_KEY,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE,
    MAX_PARTS,
    MAX_SCHEMA_CHARACTERS,
    MAX_SCHEMAS_CHARACTERS,
    MAX_USER_CHARACTERS,
    FieldRule,
    check_name,
)
from pomelo.gen.v1.task_pb2 import TaskSpec

PROTO = Path(__file__).parents[2] / "proto" / "pomelo" / "v1"
_FIELD = re.compile(r"((?:^ *// .*\n)+) *(?:optional |repeated )?[\w.<>, ]+ (\w+) = \d+;", re.MULTILINE)
_NUMBER = r"-?[\d.,]*\d(?:\^\d+ - 1)?"


def comments(message: str) -> dict[str, str]:
    """The comment of each field of a message."""
    (text,) = [
        block[1]
        for path in PROTO.glob("*.proto")
        for block in [
            re.search(rf"^message {message} {{\n(.*?)^}}", path.read_text(), re.MULTILINE | re.DOTALL)
        ]
        if block is not None
    ]
    return {
        found[2]: " ".join(line.strip().removeprefix("// ") for line in found[1].splitlines())
        for found in _FIELD.finditer(text)
    }


def number(text: str) -> float:
    base, power, exponent = text.removesuffix(" - 1").partition("^")
    return int(base) ** int(exponent) - 1 if power else float(text.replace(",", ""))


def rules() -> dict[tuple[str, str], FieldRule]:
    """The rule of each field of an input, by message and name."""
    found = {}
    for task_format in TASK_FORMATS.values():
        message = TaskSpec.DESCRIPTOR.fields_by_name[task_format.input].message_type
        assert message is not None
        for field, rule in task_format.rules.items():
            if field not in message.fields_by_name:
                continue  # a field of the spec or of the options
            found[message.name, field] = rule
            inner = message.fields_by_name[field].message_type
            if rule.fields is not None and inner is not None:
                found |= {(inner.name, each): part for each, part in rule.fields.items()}
    return found


@pytest.mark.parametrize(("message", "field"), rules())
def test_a_comment_states_the_rule_of_its_field(message: str, field: str) -> None:
    rule = rules()[message, field]
    comment = comments(message)[field]
    assert ("Required." in comment) == rule.required, comment
    assert rule.required or "Default: " in comment, comment
    if rule.maximum is not None:
        ranges = re.findall(rf"({_NUMBER}) to ({_NUMBER})", comment)
        assert [(number(low), number(high)) for low, high in ranges] == [(rule.minimum, rule.maximum)], (
            comment
        )
    elif rule.minimum is not None:
        assert re.findall(rf"from ({_NUMBER})", comment) == [str(rule.minimum)], comment
    if rule.max_items is not None:
        assert f"{rule.max_items:,}" in comment, comment
    defaults = re.findall(rf"Default: ({_NUMBER})\.", comment)
    assert defaults == ([str(rule.default)] if type(rule.default) is int else []), comment
    if rule.max_length is not None:
        assert f"1 to {rule.max_length:,} " in comment, comment


def test_the_comments_of_messages_and_labels_state_their_limits() -> None:
    assert f"1 to {MAX_PARTS} parts" in comments("Message")["content"]
    labels = comments("TaskSpec")
    assert f"up to {MAX_USER_CHARACTERS} characters" in labels["user"]
    assert (
        f"up to {MAX_METADATA_PAIRS} pairs, keys of 1 to {MAX_METADATA_KEY} characters, values of up to {MAX_METADATA_VALUE}"
        in labels["metadata"]
    )


def test_the_comments_of_tools_state_their_limits() -> None:
    call = comments("ToolCall")
    assert f": 1 to {MAX_CALL_CHARACTERS} characters" in call["id"]
    assert f": 1 to {MAX_CALL_CHARACTERS} characters" in call["name"]
    schema = f"at most {MAX_SCHEMA_CHARACTERS:,} characters"
    assert f"{schema}, and at most {MAX_SCHEMAS_CHARACTERS:,} in all" in comments("Tool")["parameters_json"]
    assert schema in comments("JsonSchema")["schema_json"]


@pytest.mark.parametrize("message", ["Message", "Tool", "JsonSchema"])
def test_the_comment_of_a_name_states_its_characters(message: str) -> None:
    with pytest.raises(PomeloError) as refused:
        check_name("ä", "name")
    assert refused.value.values["expected"] in comments(message)["name"]
