"""Vendors, jobs and drivers for the tests of text providers."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pomelo.catalog.catalog import Route
from pomelo.gen.v1.text_pb2 import (
    ContentPart,
    ContentParts,
    FinishReason,
    ImageUrl,
    Message,
    Role,
    TextDelta,
    TextInput,
)
from pomelo.providers import Credentials
from pomelo.providers.anthropic import Anthropic
from pomelo.providers.base import Job
from pomelo.providers.chat.compatible import Compatible, host
from pomelo.providers.chat.mistral import Mistral
from pomelo.providers.http.client import Http, Timeouts
from pomelo.testing import FaultUpstream, Received, anthropic_protocol, mistral_protocol, openai_protocol
from tests.providers.openai.rig import KEY, PROMPT, deltas, failure
from tests.providers.openai.rig import job as plain_job

__all__ = [
    "KEY",
    "PROMPT",
    "VENDORS",
    "Vendor",
    "check_no_secrets",
    "deltas",
    "failure",
    "largest_input",
    "open_provider",
]

STOP = FinishReason.FINISH_REASON_STOP
LENGTH = FinishReason.FINISH_REASON_LENGTH
FILTERED = FinishReason.FINISH_REASON_CONTENT_FILTER
PNG = "data:image/png;base64,iVBORw0KGgo="


@dataclass(frozen=True)
class Vendor:
    """A provider of text, and the test protocol of its vendor. `max_output_tokens` is the model's limit of
    output tokens."""

    name: str
    make: Callable[[Credentials, Http], Any]
    protocol: ModuleType
    base_url: Callable[[FaultUpstream], str]
    route: Route
    counts: tuple[str, str] = ("prompt_tokens", "completion_tokens")
    max_output_tokens: int = 0

    def job(
        self, text_input: TextInput | None = None, *, stream: bool, route: Route | None = None
    ) -> Job[Any]:
        """A text job for this vendor."""
        return plain_job(
            text_input, stream=stream, route=route or self.route, max_output_tokens=self.max_output_tokens
        )

    def usage(self, prompt: Any, completion: Any) -> dict[str, Any]:
        """Counts as this vendor gives them."""
        return dict(zip(self.counts, (prompt, completion), strict=True))


ANTHROPIC = Vendor(
    "anthropic",
    Anthropic,
    anthropic_protocol,
    lambda upstream: upstream.anthropic_base_url,
    Route("anthropic", "claude-haiku-4-5", clamp={"temperature": (0, 1, 0)}),
    ("input_tokens", "output_tokens"),
)
LONG = Vendor(
    "anthropic, long answers",
    ANTHROPIC.make,
    anthropic_protocol,
    ANTHROPIC.base_url,
    ANTHROPIC.route,
    ANTHROPIC.counts,
    max_output_tokens=64_000,
)
MISTRAL = Vendor(
    "mistral",
    Mistral,
    mistral_protocol,
    lambda upstream: upstream.mistral_base_url,
    Route("mistral", "mistral-small-latest", clamp={"temperature": (0, 1.5, 0)}),
)
COMPATIBLE = Vendor(
    "a compatible host",
    lambda credentials, http: Compatible(credentials, http, host("ahost", {})),
    openai_protocol,
    lambda upstream: upstream.openai_base_url,
    Route("ahost", "mixtral:8x7b"),
)
VENDORS = (ANTHROPIC, LONG, MISTRAL, COMPATIBLE)


@asynccontextmanager
async def open_provider(
    vendor: Vendor, base_url: str, *, key: str | None = KEY, **timeouts: float
) -> AsyncIterator[Any]:
    """The vendor's provider, called at `base_url`."""
    async with Http(Timeouts(**timeouts)) as http:
        provider = vendor.make(Credentials(key, base_url), http)
        yield provider
        await provider.aclose()


def largest_input() -> TextInput:
    """Returns a text input that sets every field."""
    return TextInput(
        messages=[
            Message(role=Role.ROLE_SYSTEM, content="Be brief. Ünïcödé 🍊"),
            Message(
                role=Role.ROLE_USER,
                parts=ContentParts(
                    parts=[ContentPart(text="What is it?"), ContentPart(image_url=ImageUrl(url=PNG))]
                ),
            ),
            Message(role=Role.ROLE_ASSISTANT, content=""),
            Message(role=Role.ROLE_ASSISTANT, parts=ContentParts(parts=[ContentPart(text="A dot.")])),
            Message(role=Role.ROLE_SYSTEM, parts=ContentParts(parts=[ContentPart(text="Be kind.")])),
            Message(role=Role.ROLE_USER, content="Sure?"),
        ],
        max_tokens=100,
        temperature=1.75,
        top_p=0.9,
        stop=["END", "\n\n"],
        seed=2**53 - 1,
        presence_penalty=-2,
        frequency_penalty=0.5,
        user="alice@example.com",
    )


async def sent(
    vendor: Vendor,
    upstream: FaultUpstream,
    text_input: TextInput,
    *,
    stream: bool = False,
    route: Route | None = None,
) -> Received:
    """The request that a job became; it was taken and answered."""
    async with open_provider(vendor, vendor.base_url(upstream)) as provider:
        answer = await deltas(provider, vendor.job(text_input, stream=stream, route=route))
    assert answer[-1].finish_reason
    return await upstream.received()


def hi(**options: Any) -> TextInput:
    """The shortest input, with options."""
    return TextInput(messages=[Message(role=Role.ROLE_USER, content="Hi")], **options)


def text(answer: list[TextDelta]) -> str:
    """The joined text."""
    return "".join(delta.content for delta in answer)


def check_last(answer: list[TextDelta], prompt: int, completion: int) -> None:
    """Only the last delta is a last one, and it has the count."""
    *earlier, last = answer
    assert not any(delta.finish_reason for delta in earlier)
    assert not any(delta.HasField("usage") for delta in earlier if not delta.content)
    assert last.finish_reason
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (prompt, completion)
    assert last.usage.total_tokens == prompt + completion


def check_no_usage(answer: list[TextDelta]) -> None:
    """Only the last delta is a last one, and it has no count."""
    *earlier, last = answer
    assert not any(delta.finish_reason for delta in earlier)
    assert last.finish_reason
    assert not (last.usage.prompt_tokens and last.usage.completion_tokens)


def check_no_secrets(error: BaseException) -> None:
    """Nothing of the key, the prompt or the vendor's words is in the message or in a log of the error."""
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__)
    for secret in (KEY, PROMPT, "canary", "<b>", "upstream broke"):
        assert secret not in shown
