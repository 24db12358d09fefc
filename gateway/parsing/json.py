"""Reads and parses JSON bodies, and limits what parsing them may cost.

Parsing holds the interpreter lock (GIL), in a thread too, so the values are counted before a body is
parsed: a string of 8 MiB parses in 5 ms, 8 MiB of `[],[],[],…` in half a second.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from io import BytesIO
from itertools import islice
from typing import Any

from jiter import from_json
from pydantic_core import from_json as partial_json

from gateway.parsing.body import RequestBody
from gateway.types.fields import shorten_name
from pomelo.errors import PomeloError, invalid

LARGE_BODY = 64 * 1024
"""Bytes up to which a body is parsed without a `JsonScan` and without waiting in the `ParseQueue`."""

MAX_VALUES = 65_536
"""Values of a body or of all fields of a form: objects, arrays, strings, numbers. The longest list of
messages that a model accepts, each with one part, has 60,000."""

MAX_ESCAPES = 1_500_000
"""Backslashes; 8 MiB of `\\u4e2d`, as JSON libraries write Chinese, have 1.4 million."""

MAX_OUTSIDE_STRINGS = 1024 * 1024
"""Bytes outside strings: brackets, numbers, white space."""

_STEP = 64 * 1024

_SPARSE = 16
"""Backslashes are sparse if there are fewer than one in so many bytes, as in prose."""

_OBJECT = "a JSON object with model and the task's fields"

_DUPLICATE = re.compile(r'Detected duplicate key "(.*)" at line', re.DOTALL)
_ESCAPED = re.compile(rb'\\["\\]')
_POSITION = re.compile(r"at line (\d+) column (\d+)")
_SURROGATE = re.compile(rb"\\u[dD][89A-Fa-f][0-9A-Fa-f]{2}")
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89ABab][0-9A-Fa-f]{2}")
_MARKER = "\ue000"
"""Marks the end of a truncated string. Any character would do that the string does not end with."""


async def read_json(body: RequestBody) -> bytes:
    """Reads the complete body; refuses one that would take `parse_json` too long.

    Raises:
        PomeloError: invalid_body, payload_too_large, overloaded, deadline_exceeded.
    """
    data = BytesIO()  # not a list of pieces, because a piece may be a single byte
    scan: JsonScan | None = None
    piece = await body.read_available()
    body.reserve_memory(len(piece))
    while piece:
        data.write(piece)
        if scan is not None:
            scan.feed(piece)
        elif data.tell() > LARGE_BODY:  # a smaller body can't take long to parse
            scan = JsonScan()
            scan.feed(data.getvalue())
        piece = await body.read_available()
        body.reserve_memory(len(piece))
    return data.getvalue()  # no copy


def parse_json(data: bytes) -> dict[str, Any]:
    """Parses a JSON object in UTF-8, with or without a byte-order mark, of at most 200 levels.

    A name that occurs twice in one object is refused, because a proxy may read the other value.

    Raises:
        PomeloError: invalid_body; invalid_parameter: a string has a lone surrogate, a name occurs twice.
    """
    if data.startswith(BOM_UTF8):
        data = data[len(BOM_UTF8) :]
    try:
        value = from_json(data, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise _syntax_error(data, str(error)) from None
    if type(value) is not dict:
        raise PomeloError("invalid_body", f"The body must be {_OBJECT}")
    return value


class JsonScan:
    """Counts the values, escapes and bytes of the JSON texts of one request, in time linear in their bytes.

    It does not validate a text: the parser stops at the first syntax error, and up to there the counts
    are correct.
    """

    __slots__ = ("_escapes", "_in_string", "_outside_strings", "_pending", "_quotes", "_values")

    def __init__(self) -> None:
        self._in_string = False
        self._pending = b""
        self._quotes = self._escapes = self._outside_strings = self._values = 0

    def begin_text(self) -> None:
        """Ends the text so far, which may be incomplete. The next piece begins another."""
        self._in_string = False
        self._pending = b""

    def feed(self, data: bytes) -> None:
        """Counts the next piece.

        Raises:
            PomeloError: invalid_body: the texts exceed a limit.
        """
        for at in range(0, len(data), _STEP):
            self._count(data[at : at + _STEP])

    def _count(self, data: bytes) -> None:
        if self._pending:
            data = self._pending + data
            self._pending = b""
        if b"\\" in data:
            if (len(data) - len(data.rstrip(b"\\"))) % 2:
                data, self._pending = data[:-1], b"\\"  # the escaped character is in the next piece
            escapes = data.count(b"\\")
            self._escapes += escapes
            if escapes < len(data) // _SPARSE:  # takes half of the time then
                data = _ESCAPED.sub(b"", data)
            else:
                data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
            if self._escapes > MAX_ESCAPES:
                raise PomeloError(
                    "invalid_body",
                    f"The JSON text has more than {MAX_ESCAPES:,} backslashes. Send UTF-8 without escapes",
                )
        if b'"' in data:
            parts = data.split(b'"')  # takes a fraction of the time of `data.count` if quotes are rare
            quotes = len(parts) - 1
            self._quotes += quotes
            if self._quotes > 4 * MAX_VALUES:  # each value may have a name
                raise _too_many()
            data = b" ".join(parts[1::2] if self._in_string else parts[::2])
            self._in_string ^= quotes % 2 == 1
        elif self._in_string:
            return
        self._outside_strings += len(data)
        self._values += len(data) - len(data.translate(None, b",[{"))
        if self._values > MAX_VALUES:
            raise _too_many()
        if self._outside_strings > MAX_OUTSIDE_STRINGS:
            raise PomeloError(
                "invalid_body",
                f"The JSON text has more than {MAX_OUTSIDE_STRINGS:,} bytes outside strings. "
                "Leave out white space",
            )


def _too_many() -> PomeloError:
    return PomeloError(
        "invalid_body", f"The JSON text has more than {MAX_VALUES:,} values. Send fewer, longer ones"
    )


def _syntax_error(data: bytes, reason: str) -> PomeloError:
    """Returns the error for text that jiter refused with the message `reason`."""
    if (duplicate := _DUPLICATE.match(reason)) is not None:
        return invalid(shorten_name(duplicate[1]), "given once")
    if not data.strip():
        return PomeloError("invalid_body", f"The body is empty. Send {_OBJECT}")
    if data.startswith(b"--"):
        return PomeloError(
            "invalid_body", "The body looks like a form. Let your HTTP client set Content-Type"
        )
    encoding = json.detect_encoding(data[:4])
    if not encoding.startswith("utf-8"):
        return PomeloError("invalid_body", f"The body is in {encoding.upper()[:6]}. Send JSON in UTF-8")
    if "unicode" in reason:
        return PomeloError("invalid_body", f"The body is not UTF-8 ({reason}). Send JSON in UTF-8")
    if "hex escape" in reason and (found := _lone_surrogate(data, reason)) is not None:
        name, escape = found
        problem = f"Unicode text; it has {escape}, which is half a surrogate pair"
        if not name:
            return PomeloError("invalid_parameter", f"The name of each field must be {problem}")
        return invalid(name, problem)
    return PomeloError("invalid_body", f"The body is not JSON: {reason}")


def _lone_surrogate(data: bytes, reason: str) -> tuple[str, str] | None:
    """Returns the field whose text has a lone surrogate (empty: the name of a field has it) and its escape;
    None if the error is another."""
    position = _POSITION.search(reason)
    if position is None:
        return None
    end = sum(map(len, islice(BytesIO(data), int(position[1]) - 1))) + int(position[2])
    at = data.rfind(b"\\u", 0, end)
    # jiter reports a high surrogate at the escape that should be its low surrogate.
    escape = _HIGH_SURROGATE.match(data, max(at - 6, 0))
    if escape is None or _is_escaped(data, escape.start()):
        escape = _SURROGATE.match(data, max(at, 0))
    if escape is None:
        return None
    truncated = data[: escape.start()] + _MARKER.encode()
    try:
        value = partial_json(truncated, allow_partial="trailing-strings")
    except ValueError:  # the string is not UTF-8 either, which is found at its end
        return None
    name = ""
    while value and not isinstance(value, str):
        if isinstance(value, dict):
            key, value = value.popitem()
            name = f"{name}.{key}" if name else key
        elif isinstance(value, list):
            name, value = f"{name}[{len(value) - 1}]", value[-1]
        else:
            break
    # Without the marker the surrogate is in a field's name, which was truncated.
    if not (isinstance(value, str) and value.endswith(_MARKER)):
        return "", escape[0].decode()
    return (shorten_name(name), escape[0].decode()) if name else None


def _is_escaped(data: bytes, at: int) -> bool:
    """Returns whether the backslash at `at` is the second one of an escaped backslash."""
    before = data[:at]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
