"""The error type and the table of all errors, the same over gRPC and REST.

Every refusal and every failure is a `PomeloError`. `pomelo.status` converts it to a gRPC status, the gateway
to an error body.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """What callers see of one error code.

    `status` is the name of the gRPC status; `message` and `retry_after` are the defaults for errors that have
    none of their own. `retry_after` is in whole seconds; None: no error of this code proposes a retry.
    `permanent`: a retry can't succeed before the operator acts, so clients must not retry automatically, even
    if `retry_after` is set.
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
    ErrorRow("model_not_found", 404, "NOT_FOUND", _REQUEST, "There is no such model. See ListModels"),
    ErrorRow("context_length_exceeded", 400, "INVALID_ARGUMENT", _REQUEST,
             "The prompt is longer than the model takes. Shorten messages"),
    ErrorRow("content_policy_violation", 400, "INVALID_ARGUMENT", _REQUEST,
             "Refused by the provider's content policy. Change the input"),
    ErrorRow("payload_too_large", 413, "RESOURCE_EXHAUSTED", _REQUEST, "The request is too large"),
    ErrorRow("unsupported_media_type", 415, "INVALID_ARGUMENT", _REQUEST,
             "Send application/json or multipart/form-data, and name it in Content-Type"),
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

RETRY_AFTER = frozenset(row.http for row in _ROWS if row.retry_after is not None)
"""HTTP statuses whose errors all propose a wait, in the header Retry-After."""

NOT_UNDER_API = frozenset({"model_not_found"})
"""Codes that no path under /api sends."""

BODY_ERRORS = frozenset({"invalid_body", "payload_too_large", "unsupported_media_type"})
"""Codes of a body or message that was not read, so the task in it is unknown."""

FAILED_KEYS_QUOTA = "failed_keys_per_minute"
"""The value `quota` of errors for the limit of failed keys of an address. All other limits are those of an
account and mode."""

REQUESTED = "requested"
"""The value of errors of a limit that the request alone exceeds: what it would count toward the limit."""

_NO_VALUES: Mapping[str, str] = MappingProxyType({})

_MAX_NAME_CHARACTERS = 100
"""Characters of a model's name that an error repeats."""


class PomeloError(Exception):
    """A refusal or a failure that is reported to the caller. Immutable.

    Its message says what to do and names the field; it never contains a key, a provider's raw body, a path
    or a stack trace. `field` is the request field at fault, or None. `retry_after` is the wait in whole
    seconds to propose; None, which rows without a wait always have: a retry is pointless. `repeatable` is
    whether clients may send the request again automatically: not if the operator has to act first, if the
    request alone exceeds a limit, or if it may then be charged twice.

    `values` are all other values that the message names, as text, for programs: numbers without separators,
    times as RFC 3339. Their keys are in lowerCamelCase, and error_reason.proto lists them by code. gRPC sends
    them, REST does not.

    `code` is one of the table; an error that only a newer version has is created from a row of its own.
    """

    def __init__(
        self,
        code: str | ErrorRow,
        message: str = "",
        *,
        field: str | None = None,
        retry_after: int | None = None,
        values: Mapping[str, object] | None = None,
        repeatable: bool = True,
    ) -> None:
        self.row: Final = TABLE[code] if isinstance(code, str) else code
        self.message: Final = message or self.row.message
        self.field: Final = field
        wait = self.row.retry_after
        self.retry_after: Final = wait if wait is None or retry_after is None else retry_after
        self.values: Final = (
            MappingProxyType({key: str(value) for key, value in values.items()}) if values else _NO_VALUES
        )
        self.repeatable: Final = repeatable and not self.row.permanent and REQUESTED not in self.values
        super().__init__(self.message)

    @property
    def code(self) -> str:
        """The code of the error, such as invalid_api_key."""
        return self.row.code


def without_traceback(error: PomeloError) -> PomeloError:
    """Removes the traceback and the cause of an error that is kept, and returns it. They reference every
    frame that the error passed, and the frame's values, such as a message of megabytes."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def missing(field: str) -> PomeloError:
    """Return the error for a required field that is missing."""
    return PomeloError("missing_parameter", f"Missing required field: {field}", field=field)


def invalid(
    field: str, expected: str, *, minimum: float | None = None, maximum: float | None = None
) -> PomeloError:
    """Return the error for an invalid field. `expected` says what it must be: "a number from 0 to 2".
    `minimum` and `maximum` are the bounds in it, of the field's value, length or number of items."""
    values: dict[str, object] = {"expected": expected}
    if minimum is not None:
        values["minimum"] = minimum
    if maximum is not None:
        values["maximum"] = maximum
    return PomeloError(
        "invalid_parameter", f"Invalid {field}: must be {expected}", field=field, values=values
    )


def unsupported_model(name: str) -> PomeloError:
    """Return the error for a task whose model does not exist."""
    shown = _shorten(name)
    message = f"Unsupported task type: {shown}"
    return PomeloError("unsupported_model", message, field="model", values={"model": shown})


def model_not_found(name: str) -> PomeloError:
    """Return the error for a look-up of a model that does not exist."""
    shown = _shorten(name)
    message = f"There is no model {shown!r}. See ListModels"
    return PomeloError("model_not_found", message, values={"model": shown})


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME_CHARACTERS else name[:_MAX_NAME_CHARACTERS] + "…"
