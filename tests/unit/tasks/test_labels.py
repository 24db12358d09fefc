"""The user and the metadata of a task: their bounds, and the characters that they may have."""

from __future__ import annotations

import pytest

from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.tasks.labels import check_labels
from tests.unit.refusals import refused

KEYS = r"Invalid metadata: must be pairs whose keys have 1 to 64 characters, without NUL"


@pytest.mark.parametrize("user", ["", "a", "ß" * 256, "\0"])
def test_a_user_has_up_to_256_characters(user: str) -> None:
    check_labels(TaskSpec(user=user))


def test_a_longer_user_is_refused() -> None:
    with refused("invalid_parameter", "user", match="at most 256 characters"):
        check_labels(TaskSpec(user="ß" * 257))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {f"key {number}": "value" for number in range(16)},
        {"k": ""},
        {"k" * 64: "v" * 512},
        {"😀" * 64: "😀" * 512},
        {"\x01 \n": "\x01 \n"},
    ],
    ids=[
        "none",
        "16 pairs",
        "an empty value",
        "the longest",
        "the longest in characters",
        "control characters",
    ],
)
def test_metadata_within_its_bounds_are_accepted(metadata: dict[str, str]) -> None:
    check_labels(TaskSpec(metadata=metadata))


@pytest.mark.parametrize(
    ("metadata", "field", "message"),
    [
        ({f"key {number}": "value" for number in range(17)}, "metadata", "at most 16 pairs"),
        ({"": "value"}, "metadata", KEYS),
        ({"k" * 65: "value"}, "metadata", KEYS),
        ({"a\0b": "value"}, "metadata", KEYS),
        ({"key": "v" * 513}, "metadata.key", "Invalid metadata.key: .*at most 512 characters, without NUL"),
        ({"key": "a\0b"}, "metadata.key", "Invalid metadata.key: .*at most 512 characters, without NUL"),
        ({"good": "value", "key": "v" * 513}, "metadata.key", "512 characters"),
    ],
    ids=[
        "17 pairs",
        "an empty key",
        "a long key",
        "NUL in a key",
        "a long value",
        "NUL in a value",
        "second",
    ],
)
def test_metadata_beyond_their_bounds_are_refused(metadata: dict[str, str], field: str, message: str) -> None:
    with refused("invalid_parameter", field, match=message):
        check_labels(TaskSpec(metadata=metadata))
