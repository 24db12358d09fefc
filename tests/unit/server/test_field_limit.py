"""The fields of a serialized message are counted as the parser would count them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pomelo.fields import MAX_MESSAGES
from pomelo.gen.v1 import text_pb2
from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.server.field_limit import MAX_FIELDS, SMALL_MESSAGE, check, excess_field
from tests.unit.refusals import refused


def packed_type() -> Any:
    """Returns a message type with repeated numbers of every width."""
    file = descriptor_pb2.FileDescriptorProto(name="packed.proto", package="packed", syntax="proto3")
    message = file.message_type.add(name="Packed")
    field_types = ("INT64", "SINT32", "BOOL", "FIXED32", "FIXED64", "FLOAT", "DOUBLE", "SFIXED32", "SFIXED64")
    for number, field_type in enumerate(field_types, 1):
        message.field.add(
            name=f"f{number}",
            number=number,
            type=getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{field_type}"),
            label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("packed.Packed"))


ALPHABET = "aé€😀"
"""A character of each length in UTF-8. Hypothesis would take seconds to list all of Unicode for the first time,
which its health check refuses."""

Packed = packed_type()
TYPES = [RunTaskRequest, StreamTaskRequest, ListUsageRequest, UploadMediaRequest, struct_pb2.Struct,
         descriptor_pb2.FileDescriptorProto, Packed]  # fmt: skip


def fields_of(message: Message) -> int:
    """Returns the number of serialized fields of a parsed message, without unknown ones."""
    total = 0
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values = list(value.values())
            nested = field.message_type.fields_by_name["value"].message_type is not None
            total += 3 * len(values) + (sum(map(fields_of, values)) if nested else 0)
        elif field.message_type is not None:
            values = value if field.is_repeated else [value]
            total += len(values) + sum(map(fields_of, values))
        elif field.is_repeated:
            total += len(value) + field.is_packed
        else:
            total += 1
    return total


def scalar(draw: Any, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return draw(
                st.binary(max_size=9) if field.type == field.TYPE_BYTES else st.text(ALPHABET, max_size=9)
            )
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw(st.booleans())
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None
            return draw(st.sampled_from([value.number for value in field.enum_type.values]))
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return draw(st.floats(width=32, allow_nan=False))
    return draw(st.integers(0, 2**31 - 1))


def fill(draw: Any, message: Any, depth: int = 0) -> None:
    fields = list(message.DESCRIPTOR.fields)
    for field in draw(st.lists(st.sampled_from(fields), max_size=4)) if fields else ():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key in draw(st.lists(st.text(ALPHABET, max_size=5), max_size=3)):
                values = getattr(message, field.name)
                if field.message_type.fields_by_name["value"].message_type is None:
                    values[key] = "value"
                else:
                    values[key].number_value = 1
        elif field.message_type is not None:
            if depth < 4:
                count = draw(st.integers(1, 3)) if field.is_repeated else 1
                for _ in range(count):
                    inner = getattr(message, field.name)
                    inner = inner.add() if field.is_repeated else inner
                    inner.SetInParent()
                    fill(draw, inner, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend([scalar(draw, field) for _ in range(draw(st.integers(1, 5)))])
        else:
            setattr(message, field.name, scalar(draw, field))


@st.composite
def messages(draw: Any) -> Any:
    message = draw(st.sampled_from(TYPES))()
    fill(draw, message)
    return message


@settings(deadline=None)
@given(messages())
def test_the_count_equals_the_fields_of_the_parsed_message(message: Any) -> None:
    data, fields = message.SerializePartialToString(), fields_of(message)
    assert excess_field(data, message.DESCRIPTOR, fields) is None
    if fields:
        assert excess_field(data, message.DESCRIPTOR, fields - 1) is not None


@settings(deadline=None)
@given(messages(), st.integers(0, 30), st.integers(0, 400), st.integers(0, 3), st.binary(max_size=12))
def test_damaged_messages_within_the_limit_have_no_more_fields_than_allowed(
    message: Any, max_fields: int, position: int, cut: int, noise: bytes
) -> None:
    data = message.SerializePartialToString()
    position = min(position, len(data))
    damaged = data[:position] + noise + data[position + cut :]
    name = excess_field(damaged, message.DESCRIPTOR, max_fields)
    try:
        parsed = type(message).FromString(damaged)
    except (DecodeError, RecursionError):
        return
    if name is None:
        assert fields_of(parsed) <= max_fields


@pytest.mark.parametrize("field", list(Packed.DESCRIPTOR.fields), ids=lambda field: field.name)
def test_each_packed_number_counts_once_however_many_bytes_it_has(field: FieldDescriptor) -> None:
    values = [1] * 40 if field.type == field.TYPE_BOOL else [0, 1, 127, 300, 40_000] * 8
    data = Packed(**{field.name: values}).SerializeToString()
    assert excess_field(data, Packed.DESCRIPTOR, 41) is None
    assert excess_field(data, Packed.DESCRIPTOR, 40) == field.name
    after = data + b"\xf8\x06\x01"  # a field that the message does not have
    assert excess_field(after, Packed.DESCRIPTOR, 42) is None
    assert excess_field(after, Packed.DESCRIPTOR, 41) == ""


@pytest.mark.parametrize(
    "unknown", [b"\xfd\x06\0\0\0\0", b"\xf9\x06" + bytes(8), b"\xfa\x06\x03abc", b"\xf8\x06\x80\x01"]
)
def test_fields_after_unknown_ones_of_each_width_are_counted(unknown: bytes) -> None:
    data = unknown * 3 + text_pb2.TextInput(messages=[text_pb2.Message()] * 5).SerializeToString()
    assert excess_field(data, text_pb2.TextInput.DESCRIPTOR, 8) is None
    assert excess_field(data, text_pb2.TextInput.DESCRIPTOR, 7) == "messages"


def grouped(number: int, inner: bytes) -> bytes:
    """Returns a protobuf group; no message of Pomelo has one."""
    return bytes((number << 3 | 3,)) + inner + bytes((number << 3 | 4,))


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(TYPES), st.integers(0, 20))
@example(b"\x80" * 300, RunTaskRequest, 5)
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", RunTaskRequest, 5)
@example(b"\x0b" * 250, RunTaskRequest, 500)
def test_counting_the_fields_of_malformed_bytes_never_fails(
    data: bytes, message_type: Any, max_fields: int
) -> None:
    name = excess_field(data, message_type.DESCRIPTOR, max_fields)
    assert name is None or isinstance(name, str)
    if len(data) <= max_fields:
        assert name is None, "no field is shorter than a byte"


def test_fields_after_a_group_are_counted() -> None:
    many = TaskSpec(text=text_pb2.TextInput(messages=[text_pb2.Message()] * 50)).SerializeToString()
    # Inside the group, a field with the number of a message field has bytes that are not a message.
    data = grouped(9, b"\x12\x03\xff\xff\xff" + grouped(2, b"\x08\x01")) + many
    assert fields_of(TaskSpec.FromString(data)) == 51
    assert excess_field(data, TaskSpec.DESCRIPTOR, 51 + 6) is None
    assert excess_field(data, TaskSpec.DESCRIPTOR, 51) == "messages"


def flood(count: int) -> bytes:
    task = TaskSpec(model="gpt-4", text=text_pb2.TextInput(messages=[text_pb2.Message()] * 1000))
    task.text.MergeFromString(b"\x0a\x00" * (count - 1000))
    return RunTaskRequest(spec=task).SerializeToString()


def test_the_error_names_the_field_that_is_repeated_too_often() -> None:
    with refused("invalid_parameter", "messages", r"Too many messages: .*60,000 fields"):
        check(flood(70_000), RunTaskRequest.DESCRIPTOR)
    stops = RunTaskRequest(spec=TaskSpec(text=text_pb2.TextInput(stop=["one"] * 60_000)))
    with refused("invalid_parameter", "stop", "Too many stop"):
        check(stops.SerializeToString(), RunTaskRequest.DESCRIPTOR)
    unknown = b"\xf8\x06\x01" * 70_000
    with refused("invalid_body", match="more than 60,000 fields"):
        check(unknown, RunTaskRequest.DESCRIPTOR)


def test_a_message_of_exactly_the_limit_is_accepted() -> None:
    around = fields_of(RunTaskRequest(spec=TaskSpec(model="gpt-4", text=text_pb2.TextInput())))
    check(flood(MAX_FIELDS - around), RunTaskRequest.DESCRIPTOR)
    with refused("invalid_parameter", "messages", "Too many messages"):
        check(flood(MAX_FIELDS - around + 1), RunTaskRequest.DESCRIPTOR)


def test_the_fields_of_a_small_message_are_not_counted() -> None:
    values = SMALL_MESSAGE - 4  # after a tag and a length
    check(Packed(f1=[1] * values).SerializeToString(), Packed.DESCRIPTOR)
    with refused("invalid_parameter", "f1"):
        check(Packed(f1=[1] * (values + 1)).SerializeToString(), Packed.DESCRIPTOR)


@pytest.mark.parametrize(
    ("number", "name"), [(b"\xff" * 9 + b"\x01", "messages"), (b"\xff" * 10 + b"\x01", None)]
)
def test_numbers_have_up_to_ten_bytes(number: bytes, name: str | None) -> None:
    data = b"\x98\x06" + number + b"\x0a\x00" * 10
    assert excess_field(data, text_pb2.TextInput.DESCRIPTOR, 5) == name


def test_a_field_within_a_repeated_one_is_named_by_it() -> None:
    unknown = b"\xf8\x06\x01" * 100
    message = text_pb2.Message(content=[text_pb2.ContentPart(image=text_pb2.ImagePart())])
    for inner, name in ((message, "messages"), (message.content[0].image, "content")):
        inner.MergeFromString(unknown)
        spec = TaskSpec(text=text_pb2.TextInput(messages=[message]))
        data = RunTaskRequest(spec=spec).SerializeToString()
        assert excess_field(data, RunTaskRequest.DESCRIPTOR, 50) == name


def test_a_long_conversation_is_within_the_limit() -> None:
    message = text_pb2.Message(role=text_pb2.ROLE_USER)
    message.content.add(text="x" * 900)
    task = TaskSpec(model="gpt-4", text=text_pb2.TextInput(messages=[message] * MAX_MESSAGES))
    check(RunTaskRequest(spec=task).SerializeToString(), RunTaskRequest.DESCRIPTOR)
    small = text_pb2.TextInput(messages=[text_pb2.Message()] * (SMALL_MESSAGE // 2)).SerializeToString()
    check(small, text_pb2.TextInput.DESCRIPTOR)


def test_counting_stops_at_the_limit() -> None:
    def seconds(message: bytes, limit: int, excess: str | None) -> float:
        began = time.process_time()
        assert excess_field(message, text_pb2.TextInput.DESCRIPTOR, limit) == excess
        return time.process_time() - began

    bomb = b"\x0a\x00" * 4_700_000
    whole = seconds(bomb, 10**8, None)
    assert seconds(bomb, MAX_FIELDS, "messages") < whole / 10
    assert seconds(b"\x80" * 9_000_000, MAX_FIELDS, None) < whole / 10
