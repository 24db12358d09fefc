"""Triggers: marks in a task's text that make the sandbox fail, wait, stall or stop half way.

`provider.py` looks for them in every text that has `[[` in it. What looks like a trigger and is none is
plain text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from pomelo.errors import TABLE, PomeloError, invalid, missing

_TRIGGER = re.compile(r"\[\[([a-z]+)(?::([a-z0-9_.]{1,40}))?\]\]")
_SECONDS = re.compile(r"\d{1,4}(?:\.\d{1,6})?")
_WORDS = re.compile(r"[1-9]\d{0,8}")
_DOORS = {"unsupported_media_type", "not_found", "method_not_allowed"}
ERRORS = frozenset(TABLE) - _DOORS
"""The codes that `[[error:CODE]]` takes: all but those that a door alone gives, which sees no task then."""


@dataclass(frozen=True, slots=True)
class Script:
    """What the triggers of a text ask for; `delay` and `pace` in seconds, `words` 0 for the default."""

    error: str = ""
    delay: float = 0
    pace: float = 0
    words: int = 0
    stall: bool = False
    cut: bool = False

    @property
    def halves(self) -> bool:
        """Whether the answer ends half way, in a failure or in silence."""
        return self.stall or self.cut


NONE = Script()
"""Of a text without triggers."""


def find(text: str) -> Script:
    """The script of a text; where a trigger stands more than once the last one counts."""
    if "[[" not in text:
        return NONE
    found: dict[str, str | float | int | bool] = {}
    for name, value in _TRIGGER.findall(text):
        if name == "error" and value in ERRORS:
            found["error"] = value
        elif name in ("delay", "pace") and _SECONDS.fullmatch(value):
            found[name] = float(value)
        elif name == "words" and _WORDS.fullmatch(value):
            found["words"] = int(value)
        elif name in ("stall", "cut") and not value:
            found[name] = True
    return Script(**found) if found else NONE  # type: ignore[arg-type]


def failure(code: str, *, field: str, model: str, now: float) -> PomeloError:
    """The error that `[[error:CODE]]` provokes, worded as the real one is.

    `field` is the field that the trigger stood in; `now` is Unix time in seconds.
    """
    match code:
        case "missing_parameter":
            return missing(field)
        case "invalid_parameter":
            return invalid(field, "something without [[error:invalid_parameter]]")
        case "unsupported_model":
            return PomeloError(code, f"Unsupported task type: {model}", field="model")
        case "rate_limit_exceeded":
            reset = datetime.fromtimestamp(int(now) + 60, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return PomeloError(code, f"Rate limit exceeded. Reset at {reset}", retry_after=60)
        case "context_length_exceeded" | "content_policy_violation":
            return PomeloError(code, field=field)
        case "model_not_allowed":
            return PomeloError(code, field="model")
        case _:
            return PomeloError(code)
