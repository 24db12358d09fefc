"""Says what is wrong with a body that can't be parsed as JSON, naming the field where there is one."""

from __future__ import annotations

import json
import re
from io import BytesIO
from itertools import islice

from pydantic_core import from_json

from gateway.fields import shorten
from pomelo.errors import PomeloError, invalid

_DUPLICATE = re.compile(r'Detected duplicate key "(.*)" at line', re.DOTALL)
_PLACE = re.compile(r"at line (\d+) column (\d+)")
_SURROGATE = re.compile(rb"\\u[dD][89A-Fa-f][0-9A-Fa-f]{2}")
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89ABab][0-9A-Fa-f]{2}")
_MARK = "\ue000"
"""Stands for the rest of a text that was cut. Any character would do that the text does not end with."""


def unreadable(data: bytes | bytearray, reason: str) -> PomeloError:
    """The refusal of a body; `reason` is what jiter says of it."""
    if (twice := _DUPLICATE.match(reason)) is not None:
        return invalid(shorten(twice[1]), "given once")
    encoding = json.detect_encoding(bytes(data[:4]))
    if not encoding.startswith("utf-8"):
        return PomeloError("invalid_body", f"The body is in {encoding.upper()[:6]}. Send JSON in UTF-8")
    if "unicode" in reason:
        return PomeloError("invalid_body", f"The body is not UTF-8 ({reason}). Send JSON in UTF-8")
    if "hex escape" in reason and (found := _half_pair(data, reason)) is not None:
        name, half = found
        return invalid(name, f"Unicode text; it has {half}, which is half a surrogate pair")
    return PomeloError("invalid_body", f"The body is not JSON: {reason}")


def _half_pair(data: bytes | bytearray, reason: str) -> tuple[str, str] | None:
    """The field whose text has half a surrogate pair, and that half; None if it is something else."""
    place = _PLACE.search(reason)
    if place is None:
        return None
    end = sum(map(len, islice(BytesIO(data), int(place[1]) - 1))) + int(place[2])
    at = data.rfind(b"\\u", 0, end)
    # A first half is noticed only at the escape that should be its second.
    half = _HIGH_SURROGATE.match(data, max(at - 6, 0))
    if half is None or _escaped(data, half.start()):
        half = _SURROGATE.match(data, max(at, 0))
    if half is None:
        return None
    value = from_json(bytes(data[: half.start()]) + _MARK.encode(), allow_partial="trailing-strings")
    name = ""
    while value and not isinstance(value, str):
        if isinstance(value, dict):
            key, value = value.popitem()
            name = f"{name}.{key}" if name else key
        elif isinstance(value, list):
            name, value = f"{name}[{len(value) - 1}]", value[-1]
        else:
            return None
    # Without the mark the half is in a field's name, which was cut off.
    ended = isinstance(value, str) and value.endswith(_MARK)
    return (shorten(name), half[0].decode()) if name and ended else None


def _escaped(data: bytes | bytearray, at: int) -> bool:
    """Whether the backslash at `at` is the second one of an escaped backslash."""
    before = data[:at]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
