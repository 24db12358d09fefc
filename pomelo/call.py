"""One call of a caller, independent of the protocol: its credentials, its deadline, and its response
headers."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.task_pb2 import Adjustment
from pomelo.ids import new_id

DEFAULT_TIMEOUT = 600.0
"""Default deadline of a task, in seconds; also the maximum that a caller can set."""

RECHECK_KEY_AFTER = 0.25
"""Seconds after the arrival of a call after which its key is checked again before its task starts, or its
body is refused: the body may have taken minutes."""

MODE_NAMES = ("test", "live")
"""The names of the modes; the index is whether the mode is live."""

_REQUEST_ID = re.compile(r"[ \t]*([\x21-\x7e]{1,128})[ \t]*")
_IDEMPOTENCY_KEY = re.compile(r"[ \t]*([\x21-\x7e]{1,255})[ \t]*")
"""White space around a header is no part of it, as HTTP defines. gRPC does not remove it."""
_NUMBER = re.compile(r"\s*[+]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,4})?\s*")
_BEARER = re.compile(r"[ \t]*bearer +(\S+)[ \t]*", re.IGNORECASE)
_PREFERENCES = re.compile(r'(?:[^,"]++|"(?:[^"\\]|\\.)*+"?)++')
_HANDLING = re.compile(
    r'\s*+handling\s*+(?:=\s*+(?:"((?:[^"\\]|\\.)*+)"|([^\s;"]*+))\s*+)?(?:;.*)?', re.IGNORECASE | re.DOTALL
)
"""The quantifiers are possessive, so that no header causes backtracking."""

_QUOTED_PAIR = re.compile(r"\\(.)")

STRICT = "handling=strict"
"""The preference to refuse a field rather than adjust it (RFC 7240)."""

REPEATED_KEY = "Authorization was given twice."
MALFORMED_KEY = "Malformed Authorization header."
"""The values of `Call.key_error`."""

_SINGLE_HEADERS = {
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
"""Headers that may not be repeated: a proxy may read a different value of a repeated one than Pomelo."""


@dataclass(frozen=True, slots=True)
class KeyBudget:
    """How many microcredits the tasks of a key may cost in a period: day, week, month or total. They are
    counted under `name`."""

    name: str
    limit: int
    period: str


@dataclass(frozen=True, slots=True)
class Principal:
    """The identity of a key. `models` is None if the key may use all of them; `plan` is the account's."""

    account: str
    key_id: str
    live: bool
    models: frozenset[str] | None = None
    plan: str = ""
    budget: KeyBudget | None = None

    @property
    def mode(self) -> str:
        """`live` or `test`."""
        return MODE_NAMES[self.live]

    @property
    def owner(self) -> str:
        """The account and the mode as one name. Stored media can be read only by their owner."""
        return f"{self.account}/{self.mode}"


@dataclass(slots=True)
class Call:
    """One call of a caller.

    `api_key` is the key as received (never log it). `protocol` is grpc or rest. `address` is the
    caller's IP address, empty over a unix socket. `deadline` is absolute, on the clock of `time.monotonic`,
    which is also the event loop's. `header_error` is the error of an invalid header, to be raised after the
    key was checked; `key_error` is a sentence about an invalid Authorization header. `principal` is set when
    the key was checked; a task that starts after `recheck_key`, on the clock of `deadline`, checks it again.
    `strict` refuses a field that the model does not support, instead of adjusting it.
    `relayed`: a gateway elsewhere sends it, so other calls for the same request may reach other servers.

    `response_headers` has the headers of the response, named as in the documentation. It is complete before a
    task's first event and on every error. `response_trailers` has those that are known only at a stream's
    end. `at_end` are the functions that `end` runs. `reserve` counts more bytes as buffered by an admitted
    call, as `pomelo.service.Visit.reserve` does; `file_bytes` are those of files that its task names.
    `reserved` is set once its task is reserved: it is counted then, and a refusal later is not.
    `settling` is set once its task is being charged: from then on, the end of the server does not end it.
    `reported` is set when its task was reported to the observers, or is not to be reported.
    `translate_adjusted` returns the value of ADJUSTED_HEADER for a caller whose API has other fields; None:
    the caller's fields are those of the task.
    """

    api_key: str | None
    request_id: str
    protocol: str
    deadline: float
    address: str = ""
    traceparent: str | None = None
    idempotency_key: str | None = None
    strict: bool = False
    relayed: bool = False
    header_error: PomeloError | None = None
    key_error: str = ""
    principal: Principal | None = None
    recheck_key: float = math.inf
    response_headers: dict[str, str] = field(default_factory=dict)
    response_trailers: dict[str, str] = field(default_factory=dict)
    at_end: list[Callable[[], None]] = field(default_factory=list)
    reserve: Callable[[int], None] = lambda size: None
    file_bytes: int = 0
    reserved: bool = False
    settling: bool = False
    reported: bool = False
    translate_adjusted: Callable[[str], str] | None = None

    def end(self) -> None:
        """Deletes the uploads that belong to this call only. Idempotent."""
        while self.at_end:
            self.at_end.pop()()

    @classmethod
    def from_headers(
        cls,
        get: Callable[[str], str | None],
        *,
        protocol: str,
        address: str = "",
        timeout: float | None = None,
        names: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> Call:
        """Reads a call from headers or metadata; `get` returns one by its lower-case name.

        `timeout` is the remaining time of the transport's own deadline (gRPC), in seconds; without it,
        `x-request-timeout` applies. `names` are the names of all headers, in any case, with repetitions.
        Never raises: errors are stored in `header_error` and `key_error`.
        """
        header_error = None
        repeated = _repeated_headers(names) if names else ()
        if timeout is None:
            header = get("x-request-timeout")
            if header is not None:
                timeout = _seconds(header)
                if timeout is None:
                    header_error = invalid("X-Request-Timeout", "a number of seconds above 0")
        if timeout is None or timeout > DEFAULT_TIMEOUT:
            timeout = DEFAULT_TIMEOUT
        request_id = get("x-request-id")
        if request_id is not None and (match := _REQUEST_ID.fullmatch(request_id)):
            request_id = match[1]
        else:
            request_id = new_id("req_")
        idempotency_key = get("idempotency-key")
        if idempotency_key is not None:
            if match := _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
                idempotency_key = match[1]
            else:
                header_error = invalid("Idempotency-Key", "1 to 255 visible ASCII characters")
        for name in repeated:
            if name != "authorization":
                header_error = invalid(_SINGLE_HEADERS[name], "given once")
        api_key, key_error = None, ""
        if "authorization" in repeated:
            key_error = REPEATED_KEY
        elif authorization := get("authorization"):
            if bearer := _BEARER.fullmatch(authorization):
                api_key = bearer[1]
            else:
                key_error = MALFORMED_KEY
        now = clock()
        return cls(
            api_key=api_key,
            request_id=request_id,
            protocol=protocol,
            address=address,
            deadline=now + timeout,
            recheck_key=now + (RECHECK_KEY_AFTER if timeout > RECHECK_KEY_AFTER else timeout),
            traceparent=get("traceparent"),
            idempotency_key=idempotency_key,
            strict=(prefer := get("prefer")) is not None and _is_strict(prefer),
            header_error=header_error,
            key_error=key_error,
            response_headers={"X-Request-Id": request_id},
        )


@asynccontextmanager
async def before_deadline(call: Call) -> AsyncIterator[None]:
    """Ends the body at the call's deadline.

    Raises:
        PomeloError: deadline_exceeded.
    """
    try:
        async with asyncio.timeout_at(call.deadline):
            yield
    except TimeoutError as error:
        raise PomeloError("deadline_exceeded") from error


def _repeated_headers(names: Collection[str]) -> set[str]:
    """Returns which of `_SINGLE_HEADERS` are repeated, in lower case."""
    counts = Counter(lower for name in names if (lower := name.lower()) in _SINGLE_HEADERS)
    return {name for name, count in counts.items() if count > 1}


def _is_strict(prefer: str) -> bool:
    """Whether a Prefer header requests strict handling. The first `handling` counts; unknown preferences are
    ignored (RFC 7240)."""
    for preference in _PREFERENCES.findall(prefer):
        if (handling := _HANDLING.fullmatch(preference)) is not None:
            return _QUOTED_PAIR.sub(r"\1", handling[1] or handling[2] or "").lower() == "strict"
    return False


def _seconds(text: str) -> float | None:
    value = float(text) if _NUMBER.fullmatch(text) else 0.0
    return value if math.isfinite(value) and value > 0 else None


CHARGED_HEADER = "X-Credits-Charged"
"""The header with the credits that a task costs."""

REPLAYED_HEADER = "Idempotent-Replayed"
"""The header of the stored answer to an Idempotency-Key."""

ADJUSTED_HEADER = "X-Pomelo-Adjusted"
"""The header, and in lower case the metadata, that lists the adjusted fields of a task's input."""


def adjusted_header(adjustments: Iterable[Adjustment]) -> str:
    """Returns the value of ADJUSTED_HEADER, such as `stop; temperature=1`."""
    return "; ".join(f"{one.field}={one.used}" if one.used else one.field for one in adjustments)


def report_adjustments(call: Call, adjustments: Sequence[Adjustment]) -> None:
    """Sets the response header of the adjustments, or removes it without adjustments."""
    value = adjusted_header(adjustments) if adjustments else ""
    if call.translate_adjusted is not None:
        value = call.translate_adjusted(value)
    if value:
        call.response_headers[ADJUSTED_HEADER] = value
    else:
        call.response_headers.pop(ADJUSTED_HEADER, None)
