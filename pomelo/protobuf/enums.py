"""The short names of the values of the contract's enums, such as "low" for REASONING_EFFORT_LOW."""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf.descriptor import EnumDescriptor


@cache
def enum_names(enum: EnumDescriptor) -> dict[Any, str]:
    """Return the names by the numbers of the values, without the unspecified one."""
    prefix = enum_prefix(enum)
    return {value.number: value.name.removeprefix(prefix).lower() for value in enum.values[1:]}


def enum_prefix(enum: EnumDescriptor) -> str:
    """Return what the names of all values begin with in the contract, such as REASONING_EFFORT_."""
    return enum.values[0].name.removesuffix("UNSPECIFIED")
