"""The one error type and the one table of errors, the same on both wires.

Everything that refuses or fails raises `PomeloError`; `pomelo.status` turns it into a gRPC status, the
gateway into an error body. Nothing here knows of a transport.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pomelo.gen.v1 import error_reason_pb2 as reasons


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One kind of error: what callers see on either wire.

    `status` is the name of the gRPC status; `message` is used where the raiser has nothing better;
    `retry_after` is the wait in whole seconds that is proposed where the raiser knows none (None: don't
    propose a retry). `permanent`: the operator has to act before a retry can succeed, so clients must not
    retry by themselves, whatever wait is proposed to their users.
    """

    code: str
    http: int
    status: str
    type: str
    message: str
    retry_after: int | None = None
    permanent: bool = False

    @property
    def reason(self) -> str:
        """The `reason` of google.rpc.ErrorInfo."""
        return self.code.upper()


_REQUEST = "invalid_request_error"

_ROWS = (
    ErrorRow("invalid_api_key", 401, "UNAUTHENTICATED", "authentication_error",
             "Missing or invalid API key. Send it as 'Authorization: Bearer YOUR_API_KEY'"),
    ErrorRow("model_not_allowed", 403, "PERMISSION_DENIED", "permission_error",
             "This key may not use the model. Use another key or ask for the model to be added"),
    ErrorRow("invalid_body", 400, "INVALID_ARGUMENT", _REQUEST, "The body can't be read"),
    ErrorRow("missing_parameter", 400, "INVALID_ARGUMENT", _REQUEST, "A required field is missing"),
    ErrorRow("invalid_parameter", 400, "INVALID_ARGUMENT", _REQUEST, "A field has a wrong value"),
    ErrorRow("unsupported_model", 400, "INVALID_ARGUMENT", _REQUEST, "Unsupported task type"),
    ErrorRow("context_length_exceeded", 400, "INVALID_ARGUMENT", _REQUEST,
             "The prompt is longer than the model takes. Shorten messages"),
    ErrorRow("content_policy_violation", 400, "INVALID_ARGUMENT", _REQUEST,
             "Refused by the provider's content policy. Change the input"),
    ErrorRow("payload_too_large", 413, "RESOURCE_EXHAUSTED", _REQUEST, "The request is too large"),
    ErrorRow("unsupported_media_type", 415, "INVALID_ARGUMENT", _REQUEST,
             "Send application/json or multipart/form-data"),
    ErrorRow("not_found", 404, "NOT_FOUND", _REQUEST, "Nothing is here. Check the path"),
    ErrorRow("method_not_allowed", 405, "UNIMPLEMENTED", _REQUEST, "The path does not take this method"),
    ErrorRow("rate_limit_exceeded", 429, "RESOURCE_EXHAUSTED", "rate_limit_error",
             "Rate limit exceeded", 60),
    ErrorRow("concurrency_limit_exceeded", 429, "RESOURCE_EXHAUSTED", "rate_limit_error",
             "Too many concurrent requests. Wait for one to end", 1),
    ErrorRow("token_limit_exceeded", 429, "RESOURCE_EXHAUSTED", "rate_limit_error",
             "Token limit of the model exceeded", 60),
    ErrorRow("insufficient_credits", 402, "FAILED_PRECONDITION", "insufficient_credits_error",
             "Insufficient credits for this operation"),
    ErrorRow("idempotency_conflict", 409, "ABORTED", _REQUEST,
             "The first request with this Idempotency-Key still runs. Retry later", 1),
    ErrorRow("idempotency_mismatch", 422, "FAILED_PRECONDITION", _REQUEST,
             "This Idempotency-Key was used for another request. Use a new one"),
    ErrorRow("provider_not_configured", 503, "UNAVAILABLE", "provider_error",
             "No provider of the model is configured. Use a test key, or ask the operator", 60, True),
    ErrorRow("provider_unavailable", 503, "UNAVAILABLE", "provider_error",
             "The provider is overloaded or down. Retry later", 5),
    ErrorRow("provider_failed", 502, "UNAVAILABLE", "provider_error",
             "The provider did not give a usable answer. Retry, or use another model"),
    ErrorRow("deadline_exceeded", 504, "DEADLINE_EXCEEDED", "timeout_error",
             "The deadline passed before the task was done. Allow more time or ask for less"),
    ErrorRow("store_unavailable", 503, "UNAVAILABLE", "api_error",
             "Storage can't be reached. Retry later", 5),
    ErrorRow("shutting_down", 503, "UNAVAILABLE", "api_error",
             "The server is shutting down. Retry, another one will answer", 1),
    ErrorRow("overloaded", 503, "UNAVAILABLE", "api_error",
             "The server has more requests than it can take. Retry later", 1),
    ErrorRow("server_unavailable", 503, "UNAVAILABLE", "api_error",
             "The gateway can't reach the server. Retry later", 1),
    ErrorRow("internal_error", 500, "INTERNAL", "api_error",
             "Something went wrong on our side. Tell us the request id"),
)  # fmt: skip

TABLE: dict[str, ErrorRow] = {row.code: row for row in _ROWS}
"""Every error by its code. Each has a value in error_reason.proto; a test holds them together."""

RETRY_AFTER = frozenset({409, 429, 503})
"""HTTP statuses whose errors say when to retry; a wait that is known for another error is not reported."""

BODY_ERRORS = frozenset({"invalid_body", "payload_too_large", "unsupported_media_type"})
"""Codes of a body or message that was not read, so nothing is known of the task in it."""


class Replay(IntEnum):
    """What may be done about a failure before anything was delivered, without doing the work twice."""

    NEVER = 0
    """Nothing: the request itself is at fault, or the work may have been done."""
    ELSEWHERE = 1
    """Nothing was done, and asking the same again is pointless: another route may be asked."""
    AGAIN = 2
    """Nothing was done: it may be asked again, after a wait."""


class PomeloError(Exception):
    """A refusal or a failure that a caller may see.

    Its message says what to do and names the field; it never holds a key, a provider's raw body, a path
    or a stack trace. `field` is the request field at fault, or None. `wait` is a wait in whole seconds that
    is known (None: none is); `retry_after` is the one to propose, None where a retry is pointless. `replay`
    is for the engine: what it may do about the failure before the caller hears of it.
    """

    __slots__ = ("field", "message", "replay", "row", "wait")

    def __init__(
        self, code: str, message: str = "", *, field: str | None = None, retry_after: int | None = None
    ) -> None:
        self.row = TABLE[code]
        self.message = message or self.row.message
        self.field = field
        self.wait = retry_after
        self.replay = Replay.NEVER
        super().__init__(self.message)

    @property
    def retry_after(self) -> int | None:
        """The wait to propose: the one that is known, else the row's."""
        return self.row.retry_after if self.wait is None else self.wait

    @property
    def code(self) -> str:
        """The row's code, such as invalid_api_key."""
        return self.row.code


def missing(field: str) -> PomeloError:
    """A required field is missing."""
    return PomeloError("missing_parameter", f"Missing required field: {field}", field=field)


def invalid(field: str, expected: str) -> PomeloError:
    """A field is wrong; `expected` says what it must be, such as "a number from 0 to 2"."""
    return PomeloError("invalid_parameter", f"Invalid {field}: must be {expected}", field=field)


REASONS = {row.reason: getattr(reasons, f"ERROR_REASON_{row.reason}") for row in _ROWS}
"""The enum value of each reason; fails at import when the table and the contract differ."""
