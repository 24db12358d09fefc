"""`TextAnswer`, a scripted answer to a conversation, whole or streamed, for all protocols of text."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from pomelo.providers.sandbox.examples import example_of
from pomelo.testing.broken import without_end
from pomelo.testing.reply import Received, Reply, Script, Step, Stop, Token, VendorFaults

COUNTED: Mapping[str, int] = {}
"""As the `usage` of an answer: the true counts, in words."""

GREETING = "Hello from the upstream."
"""The text of an answer that is not scripted."""

JSON = {"Content-Type": "application/json"}

_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_CALLED = {"stop": "tool_calls", "end_turn": "tool_use"}
"""A vendor's finish reason of a text -> that of tool calls."""

_PIECE = 9
"""Characters of a piece of arguments."""

_WORD = re.compile(r"\s*\S+|\s+\Z")


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of an answer. `id` None: the protocol makes one."""

    name: str
    arguments: str = "{}"
    id: str | None = None


@dataclass(frozen=True, slots=True)
class TextAnswer(ABC):
    """A script that answers a conversation with `text`, whole or streamed as requested.

    A stream has an event for each word, and then those of the tool calls. `at` inserts steps after a number
    of events: {0: …} is before the first, {2: Gate()} stalls after two, {2: Stop.RESET} resets the connection
    there; bytes are sent unchanged. In a whole answer, the steps of 0 are before the body, all others in its
    middle. `before` is before the head.

    `tool_calls` follow the text. None: as the request asks. If it has tools, the tool of its `tool_choice`,
    or the first, is called with an example of its schema, unless the choice is none or the last message is
    the result of a tool. If it has a schema for the output, an example of it replaces the default text.

    `finish_reason` is the vendor's own value; None leaves it out, as `usage` None and `done` False leave out
    the usage and the end marker. The true count of output includes `reasoning_tokens`. `packing` puts an
    event, everything up to the next other step, or a single byte into each packet; `line_end` and `comments`
    change the form of the events.
    """

    text: str = GREETING
    finish_reason: str | None = "stop"
    usage: Any = field(default_factory=lambda: COUNTED)
    done: bool = True
    at: Mapping[int, Step | Sequence[Step]] = field(default_factory=dict)
    before: tuple[Step, ...] = ()
    packing: Literal["events", "together", "bytes"] = "events"
    line_end: bytes = b"\n"
    comments: bool = False
    reasoning_tokens: int = 0
    tool_calls: tuple[Call, ...] | None = None

    def __call__(self, received: Received) -> Reply:
        answer = self._asked(received) if self.tool_calls is None else self
        if received.body.get("stream"):
            return Reply(headers=_EVENTS, before=self.before, steps=tuple(answer._packed(received)))
        return Reply(headers=JSON, before=self.before, steps=tuple(answer._whole(received)))

    @abstractmethod
    def true_usage(self, received: Received, prompt: int, completion: int) -> dict[str, Any]:
        """The usage of an answer with these counts, in words."""

    @abstractmethod
    def body(self, received: Received) -> dict[str, Any]:
        """The whole answer."""

    @abstractmethod
    def beginning(self, received: Received) -> list[bytes]:
        """The events before the first word."""

    @abstractmethod
    def event(self, received: Received, number: int, word: str) -> bytes:
        """The event of a word; the first has number 1."""

    def call_events(self, received: Received) -> list[bytes]:
        """The events of the tool calls."""
        return []

    def tool_to_call(self, received: Received) -> tuple[str, Any] | None:
        """The name and the schema of the tool that a request asks to call; None without one."""
        return chosen_tool(received.body)

    def output_schema(self, received: Received) -> Any:
        """The schema of the output that a request asks for; None without one."""
        return output_schema(received.body)

    @abstractmethod
    def ending(self, received: Received) -> list[bytes]:
        """The events after the last word and the last tool call."""

    def output(self) -> str:
        """The text that is split into words."""
        return self.text

    def counts(self, received: Received) -> tuple[int, int]:
        """The words of the conversation, and those of the answer and its reasoning."""
        prompt = sum(len(str(message.get("content") or "").split()) for message in received.body["messages"])
        calls = sum(len(call.arguments.split()) for call in self.tool_calls or ())
        return prompt, len(self.output().split()) + calls + self.reasoning_tokens

    def usage_field(self, received: Received) -> dict[str, Any]:
        """The field `usage`, or no field."""
        usage = self.usage
        if usage is COUNTED:
            usage = self.true_usage(received, *self.counts(received))
        return {} if usage is None else {"usage": usage}

    def _asked(self, received: Received) -> Self:
        """This answer with the tool call, or in the format, that a request asks for."""
        if tool := self.tool_to_call(received):
            name, schema = tool
            return replace(
                self,
                text="" if self.text == GREETING else self.text,
                tool_calls=(Call(name, json.dumps(example_of(schema), separators=(",", ":"))),),
                finish_reason=_CALLED.get(self.finish_reason or "", self.finish_reason),
            )
        schema = self.output_schema(received)
        if schema is not None and self.text == GREETING:
            return replace(self, text=json.dumps(example_of(schema)))
        return self

    def _whole(self, received: Received) -> list[Step]:
        body = json.dumps(self.body(received), ensure_ascii=False).encode()
        middle = [step for number, steps in self.at.items() if number for step in as_steps(steps)]
        half = len(body) // 2 if middle else len(body)
        start: list[Step] = [*as_steps(self.at.get(0, ())), Token(body[:half])]
        return [*start, *middle, body[half:]] if middle else start

    def _streamed(self, received: Received) -> list[Step]:
        steps: list[Step] = [*self.beginning(received), *as_steps(self.at.get(0, ()))]
        words = enumerate(_WORD.findall(self.output()), 1)
        events = [self.event(received, number, word) for number, word in words]
        for number, event in enumerate([*events, *self.call_events(received)], 1):
            steps.append(Token(event))
            steps += as_steps(self.at.get(number, ()))
        return steps + self.ending(received)

    def _packed(self, received: Received) -> list[Step]:
        packed: list[Step] = []
        for step in self._streamed(received):
            if not isinstance(step, bytes):
                packed.append(step)
                continue
            packet = b": a comment\n\n" + step if self.comments else bytes(step)
            packet = packet.replace(b"\n", self.line_end)
            if self.packing == "bytes":
                packed += [packet[index : index + 1] for index in range(len(packet))]
            elif self.packing == "together" and packed and isinstance(packed[-1], bytes):
                packed[-1] += packet
            else:
                packed.append(type(step)(packet))
        return packed


DONE = b"data: [DONE]\n\n"
"""The end marker of chat completions."""


def chosen_tool(body: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the name and the schema of the tool that a request for chat completions asks to call."""
    choice = body.get("tool_choice")
    if not body.get("tools") or choice == "none" or body["messages"][-1]["role"] == "tool":
        return None
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in body["tools"]}
    name = choice["function"]["name"] if isinstance(choice, dict) else next(iter(schemas))
    return name, schemas.get(name) or {"type": "object"}


def output_schema(body: Mapping[str, Any]) -> Any:
    """Return the schema of the output that a request for chat completions asks for."""
    return ((body.get("response_format") or {}).get("json_schema") or {}).get("schema")


def whole_calls(calls: Iterable[Call] | None, form: str) -> list[dict[str, Any]]:
    """Return tool calls of chat completions; `form` makes their ids of their numbers."""
    return [
        {
            "id": form.format(number) if call.id is None else call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for number, call in enumerate(calls or (), 1)
    ]


def pieces(arguments: str) -> list[str]:
    """Return arguments in pieces, as they are streamed."""
    return [arguments[at : at + _PIECE] for at in range(0, len(arguments), _PIECE)]


def data_event(body: Any) -> bytes:
    """Return an event without a name."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def token_counts(prompt: int, completion: int) -> dict[str, int]:
    """Return the usage of chat completions with these counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def text_faults(
    valid: TextAnswer,
    usage: Callable[[int, int], Any],
    busy: bytes,
    unknown: bytes,
    refusals: Mapping[str, Script],
    unsupported: Mapping[str, str] | None = None,
) -> VendorFaults:
    """Return the faults of a protocol of text, made from a `valid` answer. `usage` makes a count from those
    of input and output; `busy` and `unknown` are error events."""

    def failing(event: bytes) -> Script:
        return replace(valid, at={2: (event, Stop.END)})

    def error(received: Received) -> Reply:
        if received.body.get("stream"):
            return Reply(headers=_EVENTS, steps=(unknown,))
        return Reply(headers=JSON, steps=(unknown.partition(b"data: ")[2].strip(),))

    return VendorFaults(
        {
            "no end marker": replace(valid, done=False),
            "silence after the end marker": without_end(valid),
            "busy half way": failing(busy),
            "an unknown error half way": failing(unknown),
            "a text without end": replace(valid, text=("x" * 200_000 + " ") * 60),
            "no finish reason": replace(valid, finish_reason=None),
            "no usage": replace(valid, usage=None),
            "usage below 0": replace(valid, usage=usage(-1, 5)),
            "usage of 2^63": replace(valid, usage=usage(2**63, 5)),
            "an error with 200": error,
            **refusals,
        },
        unsupported or {},
    )


def as_steps(steps: Step | Sequence[Step]) -> list[Step]:
    if isinstance(steps, bytes) or not isinstance(steps, Sequence):
        return [steps]
    return list(steps)
