"""Vendors of text, jobs for them, and functions that run and check them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from pomelo.catalog.catalog import Limits, Route
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import ContentPart, FinishReason, ImagePart, Message, Role, TextInput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers import Credentials
from pomelo.providers.anthropic import Anthropic
from pomelo.providers.base import Event, Job
from pomelo.providers.chat.compatible import Compatible, host
from pomelo.providers.chat.mistral import Mistral
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.http.client import Http
from pomelo.testing import FaultUpstream, Received, anthropic_protocol, mistral_protocol, openai_protocol
from tests.providers.rig import PROMPT, base_url, make_job, open_provider, read_all, run

STOP = FinishReason.FINISH_REASON_STOP
LENGTH = FinishReason.FINISH_REASON_LENGTH
FILTERED = FinishReason.FINISH_REASON_CONTENT_FILTER
USER = "alice@example.com"
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
        self,
        text_input: TextInput | None = None,
        *,
        stream: bool,
        route: Route | None = None,
        user: str = "",
    ) -> Job[Any]:
        """A text job for this vendor; with the shortest input by default."""
        limits = Limits(max_output_tokens=self.max_output_tokens)
        return make_job(
            TaskType.TASK_TYPE_TEXT,
            route or self.route,
            text_input or hi(PROMPT),
            stream=stream,
            limits=limits,
            user=user,
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
            message(Role.ROLE_SYSTEM, "Be brief. Ünïcödé 🍊"),
            Message(role=Role.ROLE_USER, content=[ContentPart(text="What is it?"), image(PNG)]),
            message(Role.ROLE_ASSISTANT, ""),
            message(Role.ROLE_ASSISTANT, "A dot.", " Or two."),
            message(Role.ROLE_SYSTEM, "Be kind.", "Be quick."),
            message(Role.ROLE_USER, "Sure?"),
        ],
        max_tokens=100,
        temperature=1.75,
        top_p=0.9,
        stop=["END", "\n\n"],
        seed=2**53 - 1,
        presence_penalty=-2,
        frequency_penalty=0.5,
    )


def hi(content: str = "Hi", **options: Any) -> TextInput:
    """The shortest input, with options."""
    return TextInput(messages=[message(Role.ROLE_USER, content)], **options)


def message(role: Role.ValueType, *texts: str) -> Message:
    """A message with a part for each text."""
    return Message(role=role, content=[ContentPart(text=text) for text in texts])


def image(url: str) -> ContentPart:
    """An image in a message."""
    return ContentPart(image=ImagePart(source=MediaSource(url=url)))


async def sent(
    vendor: Vendor,
    upstream: FaultUpstream,
    text_input: TextInput,
    *,
    stream: bool = False,
    route: Route | None = None,
    user: str = "",
) -> Received:
    """The request that a job became; it was taken and answered."""
    async with open_provider(vendor.make, base_url(upstream, vendor.server)) as provider:
        answer = await read_all(provider, vendor.job(text_input, stream=stream, route=route, user=user))
    assert finish_reason(answer)
    return await upstream.received()


async def failure(provider: Any, text_job: Job[Any]) -> tuple[PomeloError, str]:
    """The error that the job ends with, and the text that came before it."""
    answer = ""
    try:
        async with aclosing(run(provider, text_job)) as events:
            async for event in events:
                answer += event.text_delta.text
                assert event.WhichOneof("event") == "text_delta", "a failed answer looked complete"
    except PomeloError as error:
        return error, answer
    raise AssertionError(f"no failure; received {answer!r}")


def texts(answer: list[Event]) -> list[str]:
    """The text of each event; of the last one, "" if the deltas before it had all of the text."""
    return [_text(event) for event in answer]


def text(answer: list[Event]) -> str:
    """The joined text."""
    return "".join(texts(answer))


def finish_reason(answer: list[Event]) -> FinishReason.ValueType:
    """The finish reason of the last event."""
    return answer[-1].completed.text.finish_reason


def reported_usage(answer: list[Event]) -> Usage:
    """The usage of the last event."""
    return answer[-1].completed.usage


def check_last(
    answer: list[Event], prompt: int, completion: int, finish: FinishReason.ValueType | None = None
) -> None:
    """Only the last event is `completed`, and it has the count, and `finish` if that is given."""
    _check_order(answer)
    assert finish_reason(answer) == finish if finish else finish_reason(answer)
    assert (reported_usage(answer).input_tokens, reported_usage(answer).output_tokens) == (prompt, completion)


def check_no_usage(answer: list[Event]) -> None:
    """Only the last event is `completed`, and it has no count."""
    _check_order(answer)
    assert finish_reason(answer)
    assert not (reported_usage(answer).input_tokens and reported_usage(answer).output_tokens)


def _text(event: Event) -> str:
    if event.HasField("text_delta"):
        return event.text_delta.text
    output = event.completed.text
    if output.HasField("message"):
        (part,) = output.message.content
        assert output.message.role == Role.ROLE_ASSISTANT
        assert part.text, "an empty part"
        return part.text
    return ""


def _check_order(answer: list[Event]) -> None:
    *earlier, last = answer
    assert all(event.text_delta.text for event in earlier)
    assert last.WhichOneof("event") == "completed"
    assert last.completed.WhichOneof("output") == "text"
