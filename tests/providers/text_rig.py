"""Vendors of text, jobs for them, and functions that run and check them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from pomelo.catalog.catalog import Limits, Route
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskType
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
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.http.client import Http
from pomelo.testing import FaultUpstream, Received, anthropic_protocol, mistral_protocol, openai_protocol
from tests.providers.rig import PROMPT, base_url, make_job, open_provider, read_all, run

STOP = FinishReason.FINISH_REASON_STOP
LENGTH = FinishReason.FINISH_REASON_LENGTH
FILTERED = FinishReason.FINISH_REASON_CONTENT_FILTER
PNG = "data:image/png;base64,iVBORw0KGgo="


@dataclass(frozen=True)
class Vendor:
    """A provider of text, and the test protocol `server` of its vendor. `max_output_tokens` is the model's limit
    of output tokens."""

    name: str
    make: Callable[[Credentials, Http], Any]
    protocol: ModuleType
    server: str
    route: Route
    counts: tuple[str, str] = ("prompt_tokens", "completion_tokens")
    max_output_tokens: int = 0

    def job(
        self, text_input: TextInput | None = None, *, stream: bool, route: Route | None = None
    ) -> Job[Any]:
        """A text job for this vendor; with the shortest input by default."""
        limits = Limits(max_output_tokens=self.max_output_tokens)
        return make_job(
            TaskType.TASK_TYPE_TEXT,
            route or self.route,
            text_input or hi(PROMPT),
            stream=stream,
            limits=limits,
        )

    def usage(self, prompt: Any, completion: Any) -> dict[str, Any]:
        """Counts as this vendor gives them."""
        return dict(zip(self.counts, (prompt, completion), strict=True))


OPENAI = Vendor("openai", OpenAI, openai_protocol, "openai", Route("openai", "gpt-4.1"))
ANTHROPIC = Vendor(
    "anthropic",
    Anthropic,
    anthropic_protocol,
    "anthropic",
    Route("anthropic", "claude-haiku-4-5", clamp={"temperature": (0, 1, 0)}),
    ("input_tokens", "output_tokens"),
)
LONG = replace(ANTHROPIC, name="anthropic, long answers", max_output_tokens=64_000)
MISTRAL = Vendor(
    "mistral",
    Mistral,
    mistral_protocol,
    "mistral",
    Route("mistral", "mistral-small-latest", clamp={"temperature": (0, 1.5, 0)}),
)
COMPATIBLE = Vendor(
    "a compatible host",
    lambda credentials, http: Compatible(credentials, http, host("ahost", {})),
    openai_protocol,
    "openai",
    Route("ahost", "mixtral:8x7b"),
)
VENDORS = (OPENAI, ANTHROPIC, LONG, MISTRAL, COMPATIBLE)


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


def hi(content: str = "Hi", **options: Any) -> TextInput:
    """The shortest input, with options."""
    return TextInput(messages=[Message(role=Role.ROLE_USER, content=content)], **options)


async def sent(
    vendor: Vendor,
    upstream: FaultUpstream,
    text_input: TextInput,
    *,
    stream: bool = False,
    route: Route | None = None,
) -> Received:
    """The request that a job became; it was taken and answered."""
    async with open_provider(vendor.make, base_url(upstream, vendor.server)) as provider:
        answer = await deltas(provider, vendor.job(text_input, stream=stream, route=route))
    assert answer[-1].finish_reason
    return await upstream.received()


async def deltas(provider: Any, text_job: Job[Any]) -> list[TextDelta]:
    """All events of the provider."""
    return [event.text_delta for event in await read_all(provider, text_job)]


async def failure(provider: Any, text_job: Job[Any]) -> tuple[PomeloError, str]:
    """The error that the job ends with, and the text that came before it."""
    answer = ""
    try:
        async with aclosing(run(provider, text_job)) as events:
            async for event in events:
                answer += event.text_delta.content
                assert not event.text_delta.finish_reason, "a failed answer looked complete"
    except PomeloError as error:
        return error, answer
    raise AssertionError(f"no failure; received {answer!r}")


def text(answer: list[TextDelta]) -> str:
    """The joined text."""
    return "".join(delta.content for delta in answer)


def check_last(
    answer: list[TextDelta], prompt: int, completion: int, finish: FinishReason.ValueType | None = None
) -> None:
    """Only the last delta is a last one, and it has the count, and `finish` if that is given."""
    *earlier, last = answer
    assert not any(delta.finish_reason for delta in earlier)
    assert not any(delta.HasField("usage") for delta in earlier if not delta.content)
    assert last.finish_reason == finish if finish else last.finish_reason
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (prompt, completion)
    assert last.usage.total_tokens == prompt + completion


def check_no_usage(answer: list[TextDelta]) -> None:
    """Only the last delta is a last one, and it has no count."""
    *earlier, last = answer
    assert not any(delta.finish_reason for delta in earlier)
    assert last.finish_reason
    assert not (last.usage.prompt_tokens and last.usage.completion_tokens)
