"""The Python client of a Pomelo server, over gRPC: `Client`, and `AsyncClient` for programs with asyncio.

    from pomelo.client import Client

    with Client(key="pml_test_…") as client:
        print(client.text("gpt-4", "Why is the sky blue?").text)

Importing it does not load the server.
"""

from __future__ import annotations

from pomelo.client.aio import AsyncClient, AsyncStream
from pomelo.client.blocking import Client, Stream
from pomelo.client.errors import (
    ApiError,
    ClientClosed,
    ConcurrencyLimitExceeded,
    ContentPolicyViolation,
    ContextLengthExceeded,
    DeadlineExceeded,
    IdempotencyConflict,
    IdempotencyMismatch,
    IncompleteStream,
    InsufficientCredits,
    InternalError,
    InvalidApiKey,
    InvalidBody,
    InvalidParameter,
    MethodNotAllowed,
    MissingParameter,
    ModelNotAllowed,
    ModelNotFound,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PomeloClientError,
    ProviderFailed,
    ProviderNotConfigured,
    ProviderUnavailable,
    RateLimitExceeded,
    ServerUnavailable,
    ShuttingDown,
    StoreUnavailable,
    TokenLimitExceeded,
    UnsupportedMediaType,
    UnsupportedModel,
)
from pomelo.client.files import Audio, File
from pomelo.client.limits import Limit, Limits, to_credits
from pomelo.client.messages import (
    JsonSchema,
    MessageDict,
    Messages,
    Tool,
    arguments,
    assistant,
    system,
    tool_result,
    user,
)
from pomelo.client.results import ImageResult, Result, SpeechResult, TextResult, Transcript
from pomelo.client.tasks import Settings, Voice
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.text_pb2 import Message, ToolCall

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "Audio",
    "Client",
    "ClientClosed",
    "ConcurrencyLimitExceeded",
    "ContentPolicyViolation",
    "ContextLengthExceeded",
    "DeadlineExceeded",
    "File",
    "IdempotencyConflict",
    "IdempotencyMismatch",
    "ImageResult",
    "IncompleteStream",
    "InsufficientCredits",
    "InternalError",
    "InvalidApiKey",
    "InvalidBody",
    "InvalidParameter",
    "JsonSchema",
    "Limit",
    "Limits",
    "Media",
    "Message",
    "MessageDict",
    "Messages",
    "MethodNotAllowed",
    "MissingParameter",
    "ModelNotAllowed",
    "ModelNotFound",
    "NotFound",
    "Overloaded",
    "PayloadTooLarge",
    "PomeloClientError",
    "ProviderFailed",
    "ProviderNotConfigured",
    "ProviderUnavailable",
    "RateLimitExceeded",
    "Result",
    "ServerUnavailable",
    "Settings",
    "ShuttingDown",
    "SpeechResult",
    "StoreUnavailable",
    "Stream",
    "TextResult",
    "TokenLimitExceeded",
    "Tool",
    "ToolCall",
    "Transcript",
    "UnsupportedMediaType",
    "UnsupportedModel",
    "Voice",
    "arguments",
    "assistant",
    "system",
    "to_credits",
    "tool_result",
    "user",
]
