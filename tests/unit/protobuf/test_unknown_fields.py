"""Fields that the contract does not have are refused at any depth, however large the message is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.protobuf.unknown_fields import check_no_unknown_fields, check_outer_fields
from tests.unit.refusals import refused
from tests.unit.tasks.collectors import BODIES, PIXEL, task_input

UNKNOWN = b"\xba\x3e\x01x"
"""Field 999, a string."""

SIZES = pytest.mark.parametrize("size", [0, 100 * 1024, 300 * 1024], ids=["small", "large", "very large"])
"""Bytes of text beside the unknown field: small messages are compared with a copy, very large ones searched."""


def conversation(size: int) -> TaskSpec:
    """A task with a text, an image and a field of every kind."""
    spec = TaskSpec(model="gpt-4", user="ann", metadata={"team": "red", "order": "7"})
    spec.text.CopyFrom(task_input("gpt-4", temperature=1.0, max_tokens=7, stop=["a"], seed=3))
    message = spec.text.messages.add(role=2)
    message.content.add(text="x" * size)
    message.content.add().image.source.url = PIXEL
    return spec


def refusal(message: Message) -> tuple[str, str, str | None] | None:
    """The code, the message and the field of the refusal of a message that arrives; None if it is accepted."""
    data = message.SerializeToString()
    try:
        check_no_unknown_fields(type(message).FromString(data), len(data), "the task")
    except PomeloError as error:
        return error.code, error.message, error.field
    return None


@SIZES
@pytest.mark.parametrize(
    ("part_of", "path"),
    [
        (lambda spec: spec, None),
        (lambda spec: spec.text, "text"),
        (lambda spec: spec.text.messages[0], "text.messages[0]"),
        (lambda spec: spec.text.messages[1], "text.messages[1]"),
        (lambda spec: spec.text.messages[1].content[0], "text.messages[1].content[0]"),
        (lambda spec: spec.text.messages[1].content[1], "text.messages[1].content[1]"),
        (lambda spec: spec.text.messages[1].content[1].image, "text.messages[1].content[1].image"),
        (
            lambda spec: spec.text.messages[1].content[1].image.source,
            "text.messages[1].content[1].image.source",
        ),
    ],
)
def test_an_unknown_field_of_a_text_task_is_refused_with_its_path(
    part_of: Callable[[TaskSpec], Message], path: str | None, size: int
) -> None:
    spec = conversation(size)
    assert refusal(spec) is None
    part_of(spec).MergeFromString(UNKNOWN)
    assert refusal(spec) == (
        "invalid_parameter",
        f"Unknown field 999 of {path or 'the task'}: this server does not have it. Leave it out, or use the "
        "server's version of the contract",
        path,
    )


@pytest.mark.parametrize("model", [model for model in BODIES if model != "gpt-4"])
def test_an_unknown_field_of_an_input_and_of_a_message_in_it_is_refused(model: str) -> None:
    given = task_input(model)
    spec = TaskSpec(model=model)
    (name,) = [one.name for one in TaskSpec.DESCRIPTOR.fields if one.message_type is given.DESCRIPTOR]
    parts: dict[str, Callable[[Any], Message]] = {name: lambda part: part}
    for field in given.DESCRIPTOR.fields:
        if field.message_type is not None:
            parts[f"{name}.{field.name}"] = lambda part, inner=field.name: getattr(part, inner)  # type: ignore[misc]
    assert (
        len(parts)
        == {"flux-1-pro": 1, "eleven-labs-tts": 2, "eleven-labs-sts": 3, "eleven-labs-stt": 2}[model]
    )
    for path, part_of in parts.items():
        getattr(spec, name).CopyFrom(given)
        assert refusal(spec) is None
        part_of(getattr(spec, name)).MergeFromString(UNKNOWN)
        found = refusal(spec)
        assert found is not None
        assert (found[0], found[2]) == ("invalid_parameter", path)


def test_an_unknown_field_of_the_options_is_refused() -> None:
    options = TaskOptions(delivery=1)  # type: ignore[arg-type]
    assert refusal(options) is None
    options.MergeFromString(UNKNOWN)
    found = refusal(options)
    assert found is not None
    assert (found[0], found[2]) == ("invalid_parameter", None)


@SIZES
def test_the_first_of_several_unknown_fields_is_reported(size: int) -> None:
    spec = conversation(size)
    spec.text.messages[1].MergeFromString(b"\xf8\x06\x01")  # field 111
    spec.text.MergeFromString(UNKNOWN * 2)
    found = refusal(spec)
    assert found is not None
    assert found[1].startswith("Unknown field 999 of text:")


def test_an_unknown_value_of_an_enum_is_no_unknown_field() -> None:
    spec = conversation(0)
    spec.text.messages[0].role = 99  # type: ignore[assignment]
    assert refusal(spec) is None


@SIZES
def test_a_pair_of_metadata_with_an_unknown_field_is_refused(size: int) -> None:
    known = b"\x0a\x01k\x12\x01v"
    for pair, found in ((known, None), (known + UNKNOWN, "Unknown field 11 of the task:")):
        data = conversation(size).SerializeToString() + b"\x5a" + bytes([len(pair)]) + pair
        refused = refusal(TaskSpec.FromString(data))
        assert (refused is None) == (found is None)
        assert refused is None or refused[1].startswith(str(found))


def test_a_long_conversation_of_short_messages_is_examined_by_a_copy() -> None:
    spec = TaskSpec(model="gpt-4")
    for _ in range(10_000):
        spec.text.messages.add(role=2).content.add(text="Hello, world")
    spec = TaskSpec.FromString(spec.SerializeToString())
    size = spec.ByteSize()
    assert 64 * 1024 < size < 256 * 1024

    def cpu_seconds(size: int) -> float:
        began = time.process_time()
        check_no_unknown_fields(spec, size, "the task")
        return time.process_time() - began

    # A message that is said to be larger is searched.
    assert 3 * min(cpu_seconds(size) for _ in range(3)) < min(cpu_seconds(2**30) for _ in range(3))


def test_only_the_fields_of_the_message_itself_are_checked_without_those_in_it() -> None:
    spec = conversation(0)
    spec.text.MergeFromString(UNKNOWN)
    check_outer_fields(spec, "the request")
    spec.MergeFromString(UNKNOWN)
    with refused("invalid_parameter", match="Unknown field 999 of the request: this server") as error:
        check_outer_fields(spec, "the request")
    assert (error.value.field, dict(error.value.values)) == (None, {"fieldNumber": "999"})
