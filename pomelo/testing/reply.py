"""Requests that a fake vendor received, and its replies, step by step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomelo.testing.form import Part


class Gate:
    """A step of a reply that waits until the test opens it. A gate that stays closed is a stall."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        """Set when a reply has reached the gate."""
        self._open = asyncio.Event()

    def open(self) -> None:
        """Let replies pass, now and later."""
        self._open.set()

    async def pass_through(self) -> None:
        """Wait until the gate is open."""
        self.reached.set()
        await self._open.wait()


class Stop(Enum):
    """Ways to end a reply early."""

    END = "end"
    """The body ends correctly, without the remaining steps."""
    CLOSE = "close"
    """The connection is closed (FIN) without the body's end."""
    RESET = "reset"
    """The connection is reset (RST)."""
    SILENCE = "silence"
    """Nothing more is sent, and the connection stays open until the client closes it."""


class Token(bytes):
    """A packet with one token of a response; tokens are counted."""


Step = bytes | float | Gate | Stop
"""A packet to send, a number of seconds to wait, a gate to pass, or an early end."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one request.

    The steps of `before` precede the head; their packets are sent raw, in place of HTTP. Each packet of
    `steps` is one write to the connection, a chunk of the chunked body. `follow` maps the `target` of later
    requests to their scripts, which are used in order; the last one is repeated.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    before: tuple[Step, ...] = ()
    follow: Mapping[str, Sequence[Script]] = field(default_factory=dict)


@dataclass(slots=True)
class Received:
    """A request, and its outcome. Times are on the running loop's clock, in seconds."""

    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytes
    body: Any
    """The parsed JSON; None if it is not JSON."""
    at: float
    bytes_sent: int = 0
    tokens_sent: int = 0
    left_at: float | None = None
    """When the client disconnected during the reply; None if it did not."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with `left_at`."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the reply has ended."""
    connection: tuple[str, int] | None = None
    """The client's address: equal for requests on one connection."""
    target: str = ""
    """The path with its query, not decoded."""
    query: Mapping[str, str] = field(default_factory=dict)
    """The query parameters; the first of several with one name."""
    form: Sequence[Part] | None = None
    """The parts of a multipart form, for which `raw` is empty; None for other bodies."""

    @property
    def prompt(self) -> str:
        """The prompt: the text of the last message of a conversation, else the field `prompt` or `text` of
        the body or of its `input`. For a form, such a field, else the SHA-256 of its file in hexadecimal
        digits: `when(sha256(audio).hexdigest(), …)`. Otherwise empty."""
        if self.form is not None:
            return _prompt_field({part.name: part.text for part in self.form}) or next(
                (part.sha256 for part in self.form if part.text is None), ""
            )
        if not isinstance(self.body, dict):
            return ""
        messages = self.body.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, dict):
            inner = self.body.get("input")
            return _prompt_field(inner if isinstance(inner, dict) else self.body)
        content = last.get("content")
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            return " ".join(text for text in texts if isinstance(text, str))
        return content if isinstance(content, str) else ""


def _prompt_field(fields: Mapping[str, Any]) -> str:
    values = (fields.get(name) for name in ("prompt", "text"))
    return next((text for text in values if isinstance(text, str)), "")


Script = Reply | Callable[[Received], Reply]
"""A reply, or a function that returns the reply to a request."""


def json_reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Return a reply with a JSON body."""
    head = {"Content-Type": "application/json", **(headers or {})}
    return Reply(status, head, (json.dumps(body, ensure_ascii=False).encode(),))


def plain_refusal(status: int, message: str) -> Reply:
    """Return a refusal whose body is a JSON object with a message."""
    return json_reply({"message": message}, status)


@dataclass(frozen=True, slots=True)
class VendorFaults:
    """The faults of one task type that are specific to a vendor, by their names in `pomelo.testing.faults`.

    `scripts` play a fault; `unsupported` gives the reason why the vendor can't have one.
    """

    scripts: Mapping[str, Script] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VendorProtocol:
    """A vendor's protocol, for the fake server.

    `serves` returns whether a request is the vendor's. `refused` returns the refusal of an invalid request,
    or None; its second argument is the only valid key, or None if every key is. `default` replies to a valid
    request. For `pomelo.testing.faults`, `refusal` makes a reply with the vendor's error body from a status
    and a message, and `faults` are the vendor's own faults by task type. `raw` are the task types whose
    response is the file itself, not JSON that contains it or leads to it.
    """

    name: str
    serves: Callable[[Received], bool]
    refused: Callable[[Received, str | None], Reply | None]
    default: Script
    refusal: Callable[[int, str], Reply] = plain_refusal
    faults: Mapping[str, VendorFaults] = field(default_factory=dict)
    raw: Collection[str] = ()
