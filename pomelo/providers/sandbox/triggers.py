"""Triggers in a task's text, such as `[[delay:2]]`, that make the sandbox fail, wait, stall or break off."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from pomelo.errors import TABLE, PomeloError, invalid, missing, unsupported_model

_TRIGGER = re.compile(r"\[\[([a-z]{1,5})(?::([a-z0-9_.]{1,40}))?\]\]")
_SECONDS = re.compile(r"\d{1,4}(?:\.\d{1,6})?")
_WORDS = re.compile(r"[1-9]\d{0,8}")
_CALLS = re.compile(r"[1-9]\d?")
_BEFORE_TASKS = {"unsupported_media_type", "not_found", "method_not_allowed", "model_not_found"}
ERRORS = frozenset(TABLE) - _BEFORE_TASKS
"""The codes that `[[error:CODE]]` accepts: all but those that a front end returns before there is a task."""


@dataclass(frozen=True, slots=True)
class Triggers:
    """The triggers of a text; `delay` and `pace` are in seconds, `words` and `calls` 0 for the default."""

    error: str = ""
    delay: float = 0
    pace: float = 0
    words: int = 0
    calls: int = 0
    stall: bool = False
    cut: bool = False

    @property
    def stops_halfway(self) -> bool:
        """Whether the answer fails or stalls halfway."""
        return self.stall or self.cut


NO_TRIGGERS = Triggers()


def parse(text: str) -> Triggers:
    """The triggers of a text. The last one of a name counts; an invalid one is plain text."""
    if "[[" not in text:
        return NO_TRIGGERS
    found: dict[str, str | float | int | bool] = {}
    for name, value in _TRIGGER.findall(text):
        if name == "error" and value in ERRORS:
            found["error"] = value
        elif name in ("delay", "pace") and _SECONDS.fullmatch(value):
            found[name] = float(value)
        elif name == "words" and _WORDS.fullmatch(value):
            found["words"] = int(value)
        elif name == "calls" and _CALLS.fullmatch(value):
            found["calls"] = int(value)
        elif name in ("stall", "cut") and not value:
            found[name] = True
    return Triggers(**found) if found else NO_TRIGGERS  # type: ignore[arg-type]


def failure(code: str, *, field: str, model: str, now: float) -> PomeloError:
    """The error that `[[error:CODE]]` provokes, with the message of the real one.

    `field` is the field that contains the trigger; `now` is Unix time in seconds.
    """
    match code:
        case "missing_parameter":
            return missing(field)
        case "invalid_parameter":
            return invalid(field, "something without [[error:invalid_parameter]]")
        case "unsupported_model":
            return unsupported_model(model)
        case "rate_limit_exceeded":
            reset = datetime.fromtimestamp(int(now) + 60, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            message = f"Rate limit exceeded. Reset at {reset}"
            return PomeloError(code, message, retry_after=60, values={"resetTime": reset})
        case "context_length_exceeded" | "content_policy_violation":
            return PomeloError(code, field=field)
        case "model_not_allowed":
            return PomeloError(code, field="model", values={"model": model})
        case _:
            return PomeloError(code)
