"""The error type and the table of all errors, the same over gRPC and REST.

Every refusal and every failure is a `PomeloError`. `pomelo.status` converts it to a gRPC status, the gateway
to an error body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """What callers see of one error code.

    `status` is the name of the gRPC status; `message` and `retry_after` are the defaults for errors that have
    none of their own. `retry_after` is in whole seconds; None proposes no retry. `permanent`: a retry can't
    succeed before the operator acts, so clients must not retry automatically, even if `retry_after` is set.
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
    ErrorRow("not_found", 404, "NOT_FOUND", _REQUEST, "Not found. Check the path"),
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
             "The first request with this Idempotency-Key is still running. Retry later", 1),
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
             "The server is shutting down. Retry: another server will answer", 1),
    ErrorRow("overloaded", 503, "UNAVAILABLE", "api_error",
             "The server has more requests than it can take. Retry later", 1),
    ErrorRow("server_unavailable", 503, "UNAVAILABLE", "api_error",
             "The gateway can't reach the server. Retry later", 1),
    ErrorRow("internal_error", 500, "INTERNAL", "api_error",
             "Internal error. Report the request id to the operator"),
)  # fmt: skip

TABLE: dict[str, ErrorRow] = {row.code: row for row in _ROWS}
"""Every error by its code. Each has a value in error_reason.proto; a test holds them together."""

RETRY_AFTER = frozenset({409, 429, 503})
"""HTTP statuses that have a Retry-After header; other statuses don't report a wait."""

BODY_ERRORS = frozenset({"invalid_body", "payload_too_large", "unsupported_media_type"})
"""Codes of a body or message that was not read, so the task in it is unknown."""


class PomeloError(Exception):
    """A refusal or a failure that is reported to the caller. Immutable.

    Its message says what to do and names the field; it never contains a key, a provider's raw body, a path
    or a stack trace. `field` is the request field at fault, or None. `retry_after` is the wait in whole
    seconds to propose, or None if a retry is pointless.
    """

    def __init__(
        self, code: str, message: str = "", *, field: str | None = None, retry_after: int | None = None
    ) -> None:
        self.row: Final = TABLE[code]
        self.message: Final = message or self.row.message
        self.field: Final = field
        self.retry_after: Final = self.row.retry_after if retry_after is None else retry_after
        super().__init__(self.message)

    @property
    def code(self) -> str:
        """The code of the error, such as invalid_api_key."""
        return self.row.code


def missing(field: str) -> PomeloError:
    """Return the error for a required field that is missing."""
    return PomeloError("missing_parameter", f"Missing required field: {field}", field=field)


def invalid(field: str, expected: str) -> PomeloError:
    """Return the error for an invalid field. `expected` says what it must be: "a number from 0 to 2"."""
    return PomeloError("invalid_parameter", f"Invalid {field}: must be {expected}", field=field)
