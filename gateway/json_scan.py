"""Limits the cost of parsing JSON text: counts its values as it arrives, before it is parsed.

Parsing holds the interpreter (GIL), in a thread too, so its cost is limited beforehand: a string of
8 MiB parses in 5 ms, 8 MiB of `[],[],[],…` in half a second.
"""

from __future__ import annotations

from pomelo.errors import PomeloError

MAX_VALUES = 65_536
"""Values of one JSON text: objects, arrays, strings, numbers. The longest list of messages that a
model accepts, each with one part, has 60,000."""

MAX_ESCAPES = 1_500_000
"""Backslashes; 8 MiB of `\\u4e2d`, as JSON libraries write Chinese, have 1.4 million."""

MAX_OUTSIDE = 1024 * 1024
"""Bytes outside strings: brackets, numbers, white space."""

_STEP = 64 * 1024


class JsonScan:
    """Counts the values, escapes and bytes of one JSON text, in time linear in its bytes.

    It does not validate the text: the parser stops at the first syntax error, and up to there the
    counts are correct.
    """

    __slots__ = ("_escapes", "_in_text", "_outside", "_quotes", "_rest", "_values")

    def __init__(self) -> None:
        self._in_text = False
        self._rest = b""
        self._quotes = self._escapes = self._outside = self._values = 0

    def feed(self, data: bytes) -> None:
        """Counts the next piece.

        Raises:
            PomeloError: invalid_body: the text exceeds a limit.
        """
        for at in range(0, len(data), _STEP):
            self._count(data[at : at + _STEP])

    def _count(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if b"\\" in data:
            if (len(data) - len(data.rstrip(b"\\"))) % 2:
                data, self._rest = data[:-1], b"\\"  # the escaped character is in the next piece
            self._escapes += data.count(b"\\")
            data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
            if self._escapes > MAX_ESCAPES:
                raise PomeloError(
                    "invalid_body",
                    f"The JSON text has more than {MAX_ESCAPES:,} backslashes. Send UTF-8 without escapes",
                )
        quotes = data.count(b'"')
        self._quotes += quotes
        if self._quotes > 4 * MAX_VALUES:  # each value may have a name
            raise _too_many()
        if quotes:
            parts = data.split(b'"')
            data = b" ".join(parts[1::2] if self._in_text else parts[::2])
            self._in_text ^= quotes % 2 == 1
        elif self._in_text:
            return
        self._outside += len(data)
        self._values += len(data) - len(data.translate(None, b",[{"))
        if self._values > MAX_VALUES:
            raise _too_many()
        if self._outside > MAX_OUTSIDE:
            raise PomeloError(
                "invalid_body",
                f"The JSON text has more than {MAX_OUTSIDE:,} bytes outside texts. Leave out white space",
            )


def _too_many() -> PomeloError:
    return PomeloError(
        "invalid_body", f"The JSON text has more than {MAX_VALUES:,} values. Send fewer, longer ones"
    )
