"""What surrounds a task on either wire: who calls, until when, and the headers that go back.

Both doors make a `Call` by `Call.from_headers`; everything below them reads it. It never travels and
knows no transport.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.task_pb2 import Adjustment
from pomelo.ids import new_id

DEFAULT_TIMEOUT = 600.0
"""Seconds that a task may take when the caller sets no deadline; also the most that a caller can get."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_REPEAT_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_NUMBER = re.compile(r"\s*[+]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,4})?\s*")
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_PREFERENCES = re.compile(r'(?:[^,"]++|"(?:[^"\\]|\\.)*+"?)++')
_HANDLING = re.compile(
    r'\s*+handling\s*+(?:=\s*+(?:"((?:[^"\\]|\\.)*+)"|([^\s;"]*+))\s*+)?(?:;.*)?', re.IGNORECASE | re.DOTALL
)
"""Possessive quantifiers: no header makes them backtrack."""

_QUOTED_PAIR = re.compile(r"\\(.)")

STRICT = "handling=strict"
"""The preference that a field is refused rather than adjusted (RFC 7240), as we write it."""

_ONCE = {
    name.lower(): name
    for name in (
        "Authorization",
        "Idempotency-Key",
        "X-Request-Id",
        "X-Request-Timeout",
        "traceparent",
        "Prefer",
        "Accept",
    )
}
"""The headers that may be given only once: if one is repeated, a proxy may read a different value than we."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a key speaks for. `models` is None when the key may use all of them; `plan` is the account's."""

    account: str
    key_id: str
    live: bool
    models: frozenset[str] | None = None
    plan: str = ""

    @property
    def mode(self) -> str:
        """`live` or `test`."""
        return "live" if self.live else "test"

    @property
    def owner(self) -> str:
        """The account and the mode, as one name. No other owner can read what this owner stores."""
        return f"{self.account}/{self.mode}"


@dataclass(slots=True)
class Call:
    """One call of a caller.

    `secret` is the caller's key as it came (never logged); `address` is the caller's IP address, empty over
    a unix socket; `deadline` is absolute, on the clock of `time.monotonic` (which is the event loop's too);
    `fault` is what was wrong with the headers, raised once the key is known to be good; `key_fault` is what
    was wrong with the one that carries the key, as a sentence. `principal` is set once the key was checked.
    `repeat_key` is the Idempotency-Key. `strict` is whether a field that the model can't take is refused, not
    adjusted. `reply` holds the headers that go back, by their names as the
    documentation writes them; it is complete when a task's first event is, and on every error. `trailer`
    holds those that are known only at a stream's end. `at_end` is what `end` runs for the REST front end
    when the request has ended, whatever the outcome.
    """

    api_key: str | None
    request_id: str
    wire: str
    deadline: float
    address: str = ""
    traceparent: str | None = None
    idempotency_key: str | None = None
    strict: bool = False
    header_error: PomeloError | None = None
    key_error: str = ""
    principal: Principal | None = None
    response_headers: dict[str, str] = field(default_factory=dict)
    response_trailers: dict[str, str] = field(default_factory=dict)
    at_end: list[Callable[[], None]] = field(default_factory=list)

    def end(self) -> None:
        """Deletes what the call brought only for its own task. Idempotent."""
        while self.at_end:
            self.at_end.pop()()

    @classmethod
    def from_headers(
        cls,
        get: Callable[[str], str | None],
        *,
        wire: str,
        address: str = "",
        timeout: float | None = None,
        names: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> Call:
        """Reads a call from headers or metadata; `get` looks one up by its lower-case name.

        `timeout` is the seconds left on a deadline that the transport itself carries (gRPC); without it,
        `x-request-timeout` counts. `names` are the headers' names as they came, in any case, once for each
        time that one was given. Never raises: errors are kept in `fault` and `key_fault`.
        """
        fault = None
        twice = _given_twice(names)
        if timeout is None:
            given = get("x-request-timeout")
            if given is not None:
                timeout = _seconds(given)
                if timeout is None:
                    fault = invalid("X-Request-Timeout", "a number of seconds above 0")
        if timeout is None or timeout > DEFAULT_TIMEOUT:
            timeout = DEFAULT_TIMEOUT
        request_id = get("x-request-id")
        if request_id is None or not _REQUEST_ID.fullmatch(request_id):
            request_id = new_id("req_")
        repeat_key = get("idempotency-key")
        if repeat_key is not None and not _REPEAT_KEY.fullmatch(repeat_key):
            fault = invalid("Idempotency-Key", "1 to 255 visible ASCII characters")
        for name in twice - {"authorization"}:
            fault = invalid(_ONCE[name], "given once")
        secret, key_fault = None, ""
        if "authorization" in twice:
            key_fault = "Authorization was given twice."
        elif bearer := _BEARER.fullmatch(get("authorization") or ""):
            secret = bearer[1]
        return cls(
            api_key=secret,
            request_id=request_id,
            wire=wire,
            address=address,
            deadline=clock() + timeout,
            traceparent=get("traceparent"),
            idempotency_key=repeat_key,
            strict=_is_strict(get("prefer")),
            header_error=fault,
            key_error=key_fault,
            response_headers={"X-Request-Id": request_id},
        )


def _given_twice(names: Iterable[str]) -> set[str]:
    """Which headers of `_ONCE` were given more than once."""
    counts = Counter(lower for name in names if (lower := name.lower()) in _ONCE)
    return {name for name, count in counts.items() if count > 1}


def _is_strict(prefer: str | None) -> bool:
    """Whether a Prefer header asks for strict handling. Of several `handling` the first one counts; what is
    not understood is ignored, as RFC 7240 wants it."""
    for preference in _PREFERENCES.findall(prefer) if prefer else ():
        if (handling := _HANDLING.fullmatch(preference)) is not None:
            return _QUOTED_PAIR.sub(r"\1", handling[1] or handling[2] or "").lower() == "strict"
    return False


def _seconds(text: str) -> float | None:
    value = float(text) if _NUMBER.fullmatch(text) else 0.0
    return value if math.isfinite(value) and value > 0 else None


ADJUSTED_HEADER = "X-Pomelo-Adjusted"
"""The header, and in lower case the metadata, that lists what was adjusted of a task's input."""


def adjusted_header(adjustments: Iterable[Adjustment]) -> str:
    """The value of ADJUSTED_HEADER, such as `stop; temperature=1`."""
    return "; ".join(f"{one.field}={one.used}" if one.used else one.field for one in adjustments)


def report_adjustments(call: Call, adjustments: Sequence[Adjustment]) -> None:
    """Puts the adjustments into the response headers, replacing earlier ones."""
    if adjustments:
        call.response_headers[ADJUSTED_HEADER] = adjusted_header(adjustments)
    else:
        call.response_headers.pop(ADJUSTED_HEADER, None)
