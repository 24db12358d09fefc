"""What is logged of a failure that nobody foresaw: where it came from, and nothing of what it says.

Both doors log with it. What an exception says may be a caller's words, a vendor's answer or a header with a
key in it, whoever wrote the code that raised it; files, lines and types are enough to find the fault.
"""

import traceback

from pomelo.errors import PomeloError


def trace(error: BaseException) -> str:
    """The frames and the type of an exception, after those of what led to it; lines of text."""
    return "\n".join(_lines(error, set()))


def _lines(error: BaseException, seen: set[int]) -> list[str]:
    seen.add(id(error))
    lines: list[str] = []
    led = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for other in (*inner, led):
        if other is not None and id(other) not in seen:
            lines += [*_lines(other, seen), "which led to"]
    lines += "".join(traceback.format_tb(error.__traceback__)).splitlines()
    kind = type(error)
    own = f": {error.code}" if isinstance(error, PomeloError) else ""
    return [*lines, f"{kind.__module__}.{kind.__qualname__}{own}"]
