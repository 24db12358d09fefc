"""What the checks of clients of OpenAI's API return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pomelo.errors import TABLE
from tests.sdk.sdk import PNG
from tests.sdk.setup import LIVE_ANSWER, TEXT, Setup

OPENAI_CLASSES = {
    "field": "BadRequestError",
    "key": "AuthenticationError",
    "credits": "APIStatusError",
    "model": "PermissionDeniedError",
    "conflict": "ConflictError",
    "mismatch": "UnprocessableEntityError",
    "limit": "RateLimitError",
    "provider": "InternalServerError",
    "deadline": "InternalServerError",
    "cut": "APIError",
}
CLASSES = {
    "python": OPENAI_CLASSES,
    "node": OPENAI_CLASSES | {"credits": "APIError"},
    "vercel": dict.fromkeys(OPENAI_CLASSES, "APICallError") | {"cut": "error part"},
    "langchain": OPENAI_CLASSES
    | {
        "field": "OpenAIInvalidRequestError",
        "key": "OpenAIAuthenticationError",
        "model": "OpenAIPermissionDeniedError",
        "limit": "OpenAIRateLimitError",
        "provider": "OpenAIAPIError",
        "deadline": "OpenAIAPIError",
    },
    "litellm": {
        **OPENAI_CLASSES,
        "credits": "APIError",
        "model": "APIError",
        "conflict": "APIError",
        "mismatch": "BadRequestError",
        "provider": "BadGatewayError",
        "deadline": "Timeout",
        "cut": "MidStreamFallbackError",
    },
}
"""The classes of the failures. LiteLLM's own have the status, but not the code."""

CODES = {
    "field": "invalid_parameter",
    "key": "invalid_api_key",
    "credits": "insufficient_credits",
    "model": "model_not_allowed",
    "conflict": "idempotency_conflict",
    "mismatch": "idempotency_mismatch",
    "limit": "token_limit_exceeded",
    "provider": "provider_failed",
    "deadline": "deadline_exceeded",
    "cut": "provider_failed",
}


def question(client: str, target: str) -> str:
    return f"What does {client} on {target} see?"


Check = Callable[[Any, Setup, str, str], None]


def check_text(text: str, target: str, said: str = "Hello there") -> None:
    if target.endswith("live"):
        assert text == LIVE_ANSWER
    else:
        assert text.startswith("This is the Pomelo sandbox")
        assert said in text


def check_chat(found: Any, _setup: Setup, _client: str, target: str) -> None:
    check_text(found["text"], target)
    assert found["tokens"] > 0


def check_stream(found: Any, _setup: Setup, _client: str, target: str) -> None:
    assert found["text"] == found["whole"]
    check_text(found["text"], target)


def check_tools(found: Any, _setup: Setup, _client: str, target: str) -> None:
    assert found["name"] == "weather"
    assert found["arguments"] == found["streamed"] == ["city", "unit"]
    assert "Sunny" in found["answer"] if target.endswith("test") else found["answer"] == LIVE_ANSWER


def check_schema(found: Any, _setup: Setup, _client: str, _target: str) -> None:
    assert found == ["city", "sky"]


def check_vision(found: Any, setup: Setup, client: str, target: str) -> None:
    asked = question(client, target)
    check_text(found, target, asked)
    if target.endswith("live"):
        (received,) = [each for each in setup.app.upstream.requests if asked in each.prompt]
        image = received.body["messages"][-1]["content"][1]["image_url"]
        assert image["url"] == f"data:image/png;base64,{PNG}"


def check_image(found: Any, _setup: Setup, _client: str, _target: str) -> None:
    assert bytes.fromhex(found) == b"\x89PNG"


def check_speech(found: Any, _setup: Setup, _client: str, target: str) -> None:
    assert bytes.fromhex(found) == (b"ID" if target.endswith("test") else b"\xff\xfb")


def check_transcription(found: Any, _setup: Setup, _client: str, _target: str) -> None:
    assert found == TEXT


def check_models(found: Any, setup: Setup, _client: str, _target: str) -> None:
    assert len(found) == 14
    assert {"gpt-4", "claude-3-haiku"} <= set(found)


def check_errors(found: Any, setup: Setup, client: str, target: str) -> None:
    for name, (raised, status, code) in found.items():
        expected = CODES[name]
        assert raised == CLASSES[client][name], (name, found)
        if name != "cut":  # a stream has no status of its own
            assert status == TABLE[expected].http, (name, found)
        assert code == expected or client == "litellm", (name, found)
    assert found.keys() == setup.targets[target].failures.keys()


def check_retries(found: Any, setup: Setup, client: str, target: str) -> None:
    check_text(found["text"], target, "busy")
    codes = setup.slots[f"{client}-{target}"].codes()
    if target.endswith("test"):
        assert (found["waits"], codes) == ([1], ["concurrency_limit_exceeded", "ok"])
    else:
        assert (found["waits"], codes) == ([7], ["provider_unavailable", "ok"])


CHECKS: dict[str, Check] = {
    "chat": check_chat,
    "stream": check_stream,
    "responses": check_stream,
    "tools": check_tools,
    "schema": check_schema,
    "vision": check_vision,
    "image": check_image,
    "speech": check_speech,
    "transcription": check_transcription,
    "models": check_models,
    "errors": check_errors,
    "retries": check_retries,
}
