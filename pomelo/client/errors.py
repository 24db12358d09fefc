"""The exceptions of the client: a class for each error code, and two for what happens in the client
itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from pomelo.client.limits import Limits, read_limits
from pomelo.status import DETAILS_KEY, from_rpc_error


class PomeloClientError(Exception):
    """The base of all exceptions of the client."""


class ClientClosed(PomeloClientError):
    """The client was closed before or during the call."""


class IncompleteStream(PomeloClientError):
    """The stream has no result: it ended without the event `completed`, or has not been read to its end."""


class ApiError(PomeloClientError):
    """A call was refused or failed. Each code has its own subclass.

    `code` is the code of the error, such as rate_limit_exceeded; `message` says what to do; `field` is the
    field at fault, or None. `values` are the values that the message names, as text: error_reason.proto lists
    them. `retry_after` is the wait in seconds that the server proposes, or None. `metadata` has the
    response's headers, by their names in lower case.
    """

    code = ""

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        values: Mapping[str, str] | None = None,
        retry_after: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.values = values or {}
        self.retry_after = retry_after
        self.metadata = metadata or {}

    def __str__(self) -> str:
        request = f" ({self.request_id})" if self.request_id else ""
        return f"{self.code}: {self.message}{request}"

    @property
    def request_id(self) -> str:
        """The id of the request, for the operator; empty if the server did not answer."""
        return self.metadata.get("x-request-id", "")

    @property
    def limits(self) -> Limits:
        """The limits and credits of the account after the call."""
        return read_limits(self.metadata)


class InvalidApiKey(ApiError):
    """The key is missing, unknown, revoked or expired."""

    code = "invalid_api_key"


class ModelNotAllowed(ApiError):
    """The key or its account's plan may not use the model."""

    code = "model_not_allowed"


class InvalidBody(ApiError):
    """The message can't be decoded."""

    code = "invalid_body"


class MissingParameter(ApiError):
    """A required field is missing."""

    code = "missing_parameter"


class InvalidParameter(ApiError):
    """A field has a wrong type, range or name."""

    code = "invalid_parameter"


class UnsupportedModel(ApiError):
    """A task names a model that does not exist."""

    code = "unsupported_model"


class ModelNotFound(ApiError):
    """A model was looked up that does not exist."""

    code = "model_not_found"


class ContextLengthExceeded(ApiError):
    """The prompt is longer than the model takes."""

    code = "context_length_exceeded"


class ContentPolicyViolation(ApiError):
    """The provider's content policy refused the input or the output."""

    code = "content_policy_violation"


class PayloadTooLarge(ApiError):
    """A message or a file is too large, or the account stores too much."""

    code = "payload_too_large"


class UnsupportedMediaType(ApiError):
    """The body is neither JSON nor a form; never sent over gRPC."""

    code = "unsupported_media_type"


class NotFound(ApiError):
    """The file or the method does not exist."""

    code = "not_found"


class MethodNotAllowed(ApiError):
    """The server does not have the method."""

    code = "method_not_allowed"


class RateLimitExceeded(ApiError):
    """The plan's requests of this minute are used up."""

    code = "rate_limit_exceeded"


class ConcurrencyLimitExceeded(ApiError):
    """As many tasks are running as the plan allows."""

    code = "concurrency_limit_exceeded"


class TokenLimitExceeded(ApiError):
    """The plan's tokens of this minute are used up for the model."""

    code = "token_limit_exceeded"


class InsufficientCredits(ApiError):
    """The balance, or the budget of the key, does not cover the task."""

    code = "insufficient_credits"


class IdempotencyConflict(ApiError):
    """The first request with the idempotency key is still running."""

    code = "idempotency_conflict"


class IdempotencyMismatch(ApiError):
    """The idempotency key was used for another request."""

    code = "idempotency_mismatch"


class ProviderNotConfigured(ApiError):
    """The operator has no credentials for the model."""

    code = "provider_not_configured"


class ProviderUnavailable(ApiError):
    """The provider is overloaded or down."""

    code = "provider_unavailable"


class ProviderFailed(ApiError):
    """The provider returned no usable answer."""

    code = "provider_failed"


class DeadlineExceeded(ApiError):
    """The timeout passed."""

    code = "deadline_exceeded"


class StoreUnavailable(ApiError):
    """The server can't reach its store."""

    code = "store_unavailable"


class ShuttingDown(ApiError):
    """The server is shutting down."""

    code = "shutting_down"


class Overloaded(ApiError):
    """The server has more calls than it takes."""

    code = "overloaded"


class ServerUnavailable(ApiError):
    """The server can't be reached, or the connection broke."""

    code = "server_unavailable"


class InternalError(ApiError):
    """A fault in Pomelo."""

    code = "internal_error"


_BY_CODE = {each.code: each for each in ApiError.__subclasses__()}


def to_error(error: Any, target: str) -> ApiError:
    """Returns the exception of a failed call (a grpc.RpcError) to a server."""
    metadata = text_metadata(error.initial_metadata(), error.trailing_metadata())
    known = from_rpc_error(error)
    message = known.message
    if error.code() is grpc.StatusCode.UNAVAILABLE and not any(
        key == DETAILS_KEY for key, _ in error.trailing_metadata() or ()
    ):
        message = f"The connection to {target} failed. Check the address, TLS, and that a server is running"
    return _BY_CODE[known.code](
        message,
        field=known.field,
        values=dict(known.values),
        retry_after=known.retry_after,
        metadata=metadata,
    )


def text_metadata(*parts: Any) -> dict[str, str]:
    """Returns the text among the metadata of a response, the later parts over the earlier ones."""
    return {key: value for part in parts for key, value in part or () if isinstance(value, str)}
