"""A scripted answer to a conversation, whole or streamed, whatever the wire: `TextAnswer`.

The wires' files give it their words; what a test can vary is here: where it stalls or breaks, what it leaves
out, how it is packed.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pomelo.testing.broken import unended
from pomelo.testing.reply import Received, Reply, Script, Step, Stop, Token, Wording

COUNTED: Mapping[str, int] = {}
"""As the `usage` of an answer: what it really has, counted by words."""

JSON = {"Content-Type": "application/json"}

_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_WORD = re.compile(r"\s*\S+|\s+\Z")


@dataclass(frozen=True, slots=True)
class TextAnswer(ABC):
    """A script: answers a conversation with `text`, whole or streamed as the request asks.

    A stream has what begins it on its wire, an event for each word, and what ends it. `at` puts steps behind
    the given number of words: {0: …} is ahead of the first, {2: Gate()} stalls after two, {2: Stop.RESET}
    cuts there; any bytes among them are sent as they are. In a whole answer the steps of 0 come ahead of the
    body, all others in its middle. `before` is ahead of the head.

    `finish_reason` is in the wire's own words; None leaves it out, as do `usage` None and `done` False the
    usage and the end marker. `packing` sends an event, everything up to the next other step, or a single byte
    in each packet; `line_end` and `comments` vary the form of the events.
    """

    text: str = "Hello from the upstream."
    finish_reason: str | None = "stop"
    usage: Any = field(default_factory=lambda: COUNTED)
    done: bool = True
    at: Mapping[int, Step | Sequence[Step]] = field(default_factory=dict)
    before: tuple[Step, ...] = ()
    packing: Literal["events", "together", "bytes"] = "events"
    line_end: bytes = b"\n"
    comments: bool = False

    def __call__(self, received: Received) -> Reply:
        """The reply to a request."""
        if received.body.get("stream"):
            return Reply(headers=_EVENTS, before=self.before, steps=tuple(self._packed(received)))
        return Reply(headers=JSON, before=self.before, steps=tuple(self._whole(received)))

    @abstractmethod
    def body(self, received: Received) -> dict[str, Any]:
        """The whole answer."""

    @abstractmethod
    def beginning(self, received: Received) -> list[bytes]:
        """The events ahead of the first word."""

    @abstractmethod
    def event(self, received: Received, number: int, word: str) -> bytes:
        """The event of a word; the first has number 1."""

    @abstractmethod
    def ending(self, received: Received) -> list[bytes]:
        """The events behind the last word."""

    def said(self) -> str:
        """The text that is cut into words."""
        return self.text

    def counts(self, received: Received) -> tuple[int, int]:
        """The words of the conversation and those of the answer."""
        prompt = sum(len(str(message.get("content") or "").split()) for message in received.body["messages"])
        return prompt, len(self.said().split())

    def _whole(self, received: Received) -> list[Step]:
        body = json.dumps(self.body(received), ensure_ascii=False).encode()
        middle = [step for number, steps in self.at.items() if number for step in _listed(steps)]
        half = len(body) // 2 if middle else len(body)
        packets: list[Step] = [Token(body[:half])]
        return [*_listed(self.at.get(0, ())), *packets, *middle, *([body[half:]] if middle else [])]

    def _streamed(self, received: Received) -> list[Step]:
        steps: list[Step] = [*self.beginning(received), *_listed(self.at.get(0, ()))]
        for number, word in enumerate(_WORD.findall(self.said()), 1):
            steps.append(Token(self.event(received, number, word)))
            steps += _listed(self.at.get(number, ()))
        return steps + self.ending(received)

    def _packed(self, received: Received) -> list[Step]:
        packed: list[Step] = []
        for step in self._streamed(received):
            if not isinstance(step, bytes):
                packed.append(step)
                continue
            kind = type(step)
            packet = b": nothing to see\n\n" + step if self.comments else bytes(step)
            packet = packet.replace(b"\n", self.line_end)
            if self.packing == "bytes":
                packed += [packet[at : at + 1] for at in range(len(packet))]
            elif self.packing == "together" and packed and isinstance(packed[-1], bytes):
                packed[-1] += packet
            else:
                packed.append(kind(packet))
        return packed


def wording(
    good: TextAnswer,
    usage: Callable[[int, int], Any],
    busy: bytes,
    unknown: bytes,
    said: Mapping[str, Script],
    lacks: Mapping[str, str] | None = None,
) -> Wording:
    """The faults of a wire of conversations, made of a `good` answer: `usage` makes a count of input and
    output, `busy` and `unknown` are events of errors; `said` has what is refused, `lacks` what never is."""

    def breaking(event: bytes) -> Script:
        return replace(good, at={2: (event, Stop.END)})

    def error(received: Received) -> Reply:
        if received.body.get("stream"):
            return Reply(headers=_EVENTS, steps=(unknown,))
        return Reply(headers=JSON, steps=(unknown.partition(b"data: ")[2].strip(),))

    return Wording(
        {
            "no end marker": replace(good, done=False),
            "silence after the end marker": unended(good),
            "busy half way": breaking(busy),
            "unknown error half way": breaking(unknown),
            "oversized text": replace(good, text=("x" * 200_000 + " ") * 60),
            "no finish reason": replace(good, finish_reason=None),
            "no usage": replace(good, usage=None),
            "usage below 0": replace(good, usage=usage(-1, 5)),
            "usage of 2^63": replace(good, usage=usage(2**63, 5)),
            "error with 200": error,
            **said,
        },
        lacks or {},
    )


def _listed(steps: Step | Sequence[Step]) -> list[Step]:
    if isinstance(steps, bytes) or not isinstance(steps, Sequence):
        return [steps]
    return list(steps)
