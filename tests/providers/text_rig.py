"""Vendors of text, jobs for them, and functions that run and check them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from pomelo.catalog.catalog import Limits, Route
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import (
    ContentPart,
    FinishReason,
    ImagePart,
    Message,
    Role,
    TextInput,
    Tool,
    ToolCall,
    ToolResult,
)
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers import Credentials
from pomelo.providers.anthropic.anthropic import Anthropic
from pomelo.providers.base import Event, Job, fit_job
from pomelo.providers.chat.compatible import Compatible, host
from pomelo.providers.chat.mistral import Mistral
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.http.client import Http
from pomelo.testing import (
    FaultUpstream,
    Received,
    Reply,
    anthropic_protocol,
    mistral_protocol,
    openai_protocol,
)
from pomelo.testing.event_checker import EventChecker
from tests.providers.rig import (
    KEY,
    PROMPT,
    Rig,
    base_url,
    check_no_secrets,
    make_job,
    open_provider,
    read_all,
    run,
)

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


@asynccontextmanager
async def a_host(upstream: FaultUpstream, key: str | None = KEY, **row: Any) -> AsyncIterator[Compatible]:
    """A host by its row, played by the upstream."""
    async with Http() as http:
        yield Compatible(Credentials(key, upstream.openai_base_url), http, host("ahost", row))


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


WEATHER = Tool(
    name="weather",
    description="The weather of a city",
    parameters_json='{"type":"object","required":["city"],"properties":{"city":{"type":"string"}},'
    '"additionalProperties":false}',
    strict=True,
)
TIME = Tool(name="time")


def tools_input(**options: Any) -> TextInput:
    """A conversation with a tool that was called twice and another that was called once, and a last question."""
    first, second, third = "call_1234567890123456789012345", "null", "2"
    return TextInput(
        messages=[
            *hi("How is the weather?").messages,
            assistant(
                "I'll ask.",
                ToolCall(id=first, name="weather", arguments_json='{"city": "Zürich"}'),
                ToolCall(id=second, name="weather", arguments_json="{"),
            ),
            result(second, "no such city", is_error=True),
            result(first, ""),
            assistant("", ToolCall(id=first, name="time")),
            result(first, "12:00"),
            message(Role.ROLE_SYSTEM, "Be brief."),
            *hi("And now?").messages,
            assistant("", ToolCall(id=third, name="weather", arguments_json='{"city":"Bonn"}')),
            result(third, "Fine"),
        ],
        tools=[WEATHER, TIME],
        **options,
    )


def assistant(content: str, *calls: ToolCall) -> Message:
    """A message of the assistant that calls tools; with an empty content, it has no text."""
    parts = [ContentPart(text=content)] if content else []
    return Message(
        role=Role.ROLE_ASSISTANT, content=[*parts, *(ContentPart(tool_call=call) for call in calls)]
    )


def result(call_id: str, content: str, *, is_error: bool = False) -> Message:
    """A message with the result of a tool."""
    tool_result = ToolResult(tool_call_id=call_id, content=content, is_error=is_error)
    return Message(role=Role.ROLE_TOOL, content=[ContentPart(tool_result=tool_result)])


def tool_calls(answer: list[Event], *, stream: bool) -> list[tuple[str, str, str]]:
    """The ids, names and arguments of the tool calls of an answer, whose events are as they must be."""
    checker = EventChecker("text", stream=stream, needs_usage=False)
    calls: list[ToolCall] = []
    for event in answer:
        checker.add(event)
        piece = event.tool_call_delta
        if piece.id:
            calls.append(ToolCall(id=piece.id, name=piece.name))
        if event.HasField("tool_call_delta"):
            calls[piece.index].arguments_json += piece.arguments_json
    assert checker.problems == []
    calls += [part.tool_call for part in answer[-1].completed.text.message.content if part.tool_call.id]
    return [(call.id, call.name, call.arguments_json) for call in calls]


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
                assert event.WhichOneof("event") != "completed", "a failed answer looked complete"
    except PomeloError as error:
        return error, answer
    raise AssertionError(f"no failure; received {answer!r}")


async def refusal_of(rig: Rig, reply: Reply, text_job: Job[Any]) -> PomeloError:
    """The error of the job whose request, which is sent once, gets this reply."""
    rig.script(reply)
    error, answer = await failure(rig.provider, text_job)
    assert answer == ""
    check_no_secrets(error)
    assert len(rig.requests) == 1, "it was sent twice"
    return error


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
        part = output.message.content[0]
        assert output.message.role == Role.ROLE_ASSISTANT
        assert part.text or part.HasField("tool_call"), "an empty part"
        assert not any(other.text for other in output.message.content[1:]), "more than one text"
        return part.text
    return ""


def _check_order(answer: list[Event]) -> None:
    *earlier, last = answer
    assert all(event.text_delta.text for event in earlier)
    assert last.WhichOneof("event") == "completed"
    assert last.completed.WhichOneof("output") == "text"


def adjusted(rig: Rig, job: Any) -> list[str]:
    """What is reported of a job."""
    adjustments = fit_job(job, rig.provider.fit_text).adjustments
    return [f"{each.field}={each.used}" if each.used else each.field for each in adjustments]
