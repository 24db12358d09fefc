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
    """A call was refused or failed. Each code has its own subclass; an error with a code that is newer than
    the client is an ApiError itself.

    `code` is the code of the error, such as rate_limit_exceeded; `message` says what to do; `field` is the
    field at fault, or None. `values` are the values that the message names, as text: error_reason.proto lists
    them. `retry_after` is the wait in seconds that the server proposes, or None. `metadata` has the
    response's headers, by their names in lower case.
    """

    code = ""

    def __init_subclass__(cls, code: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.code = code or cls.code

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


class InvalidApiKey(ApiError, code="invalid_api_key"):
    """The key is missing, unknown, revoked or expired."""


class ModelNotAllowed(ApiError, code="model_not_allowed"):
    """The key or its account's plan may not use the model."""


class InvalidBody(ApiError, code="invalid_body"):
    """The message can't be decoded."""


class MissingParameter(ApiError, code="missing_parameter"):
    """A required field is missing."""


class InvalidParameter(ApiError, code="invalid_parameter"):
    """A field has a wrong type, range or name."""


class UnsupportedModel(ApiError, code="unsupported_model"):
    """A task names a model that does not exist."""


class ModelNotFound(ApiError, code="model_not_found"):
    """A model was looked up that does not exist."""


class ContextLengthExceeded(ApiError, code="context_length_exceeded"):
    """The prompt is longer than the model takes."""


class ContentPolicyViolation(ApiError, code="content_policy_violation"):
    """The provider's content policy refused the input or the output."""


class PayloadTooLarge(ApiError, code="payload_too_large"):
    """A message or a file is too large, or the account stores too much."""


class UnsupportedMediaType(ApiError, code="unsupported_media_type"):
    """The body is neither JSON nor a form; never sent over gRPC."""


class NotFound(ApiError, code="not_found"):
    """The file or the method does not exist."""


class MethodNotAllowed(ApiError, code="method_not_allowed"):
    """The server does not have the method."""


class RateLimitExceeded(ApiError, code="rate_limit_exceeded"):
    """The plan's requests of this minute are used up."""


class ConcurrencyLimitExceeded(ApiError, code="concurrency_limit_exceeded"):
    """As many tasks are running as the plan allows."""


class TokenLimitExceeded(ApiError, code="token_limit_exceeded"):
    """The plan's tokens of this minute are used up for the model."""


class InsufficientCredits(ApiError, code="insufficient_credits"):
    """The balance, or the budget of the key, does not cover the task."""


class IdempotencyConflict(ApiError, code="idempotency_conflict"):
    """The first request with the idempotency key is still running."""


class IdempotencyMismatch(ApiError, code="idempotency_mismatch"):
    """The idempotency key was used for another request."""


class ProviderNotConfigured(ApiError, code="provider_not_configured"):
    """The operator has no credentials for the model."""


class ProviderUnavailable(ApiError, code="provider_unavailable"):
    """The provider is overloaded or down."""


class ProviderFailed(ApiError, code="provider_failed"):
    """The provider returned no usable answer."""


class DeadlineExceeded(ApiError, code="deadline_exceeded"):
    """The timeout passed."""


class StoreUnavailable(ApiError, code="store_unavailable"):
    """The server can't reach its store."""


class ShuttingDown(ApiError, code="shutting_down"):
    """The server is shutting down."""


class Overloaded(ApiError, code="overloaded"):
    """The server has more calls than it takes."""


class ServerUnavailable(ApiError, code="server_unavailable"):
    """The server can't be reached, or the connection broke."""


class InternalError(ApiError, code="internal_error"):
    """A fault in Pomelo."""


_BY_CODE = {each.code: each for each in ApiError.__subclasses__()}


def to_error(error: Any, target: str) -> ApiError:
    """Returns the exception of a failed call (a grpc.RpcError) to a server."""
    trailing = error.trailing_metadata() or ()
    known = from_rpc_error(error)
    message = known.message
    if error.code() is grpc.StatusCode.UNAVAILABLE and not any(key == DETAILS_KEY for key, _ in trailing):
        message = f"The connection to {target} failed. Check the address, TLS, and that a server is running"
    raised = _BY_CODE.get(known.code, ApiError)(
        message,
        field=known.field,
        values=dict(known.values),
        retry_after=known.retry_after,
        metadata=text_metadata(error.initial_metadata(), trailing),
    )
    raised.code = known.code
    return raised


def text_metadata(*parts: Any) -> dict[str, str]:
    """Returns the text among the metadata of a response, the later parts over the earlier ones."""
    return {key: value for part in parts for key, value in part or () if isinstance(value, str)}
