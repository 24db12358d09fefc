"""What a request was and how it is answered, step by step: the vocabulary of `pomelo.testing`.

The server plays it, a wire's file composes it. Neither a vendor nor a socket is known here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomelo.testing.form import Part


class Gate:
    """A place in a reply where it waits until the test opens it; one that stays shut is a stall."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        """Set when a reply has come here."""
        self._open = asyncio.Event()

    def open(self) -> None:
        """Lets replies pass, now and later."""
        self._open.set()

    async def pass_through(self) -> None:
        """Waits here; the server calls it."""
        self.reached.set()
        await self._open.wait()


class Stop(Enum):
    """Ways to end a reply before its time."""

    END = "end"
    """The body ends in good order, and nothing more comes."""
    CLOSE = "close"
    """The connection is closed (FIN) without the body's end."""
    RESET = "reset"
    """The connection is reset (RST)."""
    SILENCE = "silence"
    """Nothing more comes, and the connection stays until the client leaves."""


class Token(bytes):
    """A packet that bears one token of an answer; they are counted."""


Step = bytes | float | Gate | Stop
"""A packet to send, seconds to wait, a gate to pass, or an early end."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What to do with one request, from top to bottom.

    `before` comes ahead of the head; a packet in it is sent raw, in place of HTTP. Each packet of `steps` is
    one write to the connection, a chunk of the chunked body. `follow` says how the requests are answered that
    this reply leads to, by their `target`: one after another, the last script again and again.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    before: tuple[Step, ...] = ()
    follow: Mapping[str, Sequence[Script]] = field(default_factory=dict)


@dataclass(slots=True)
class Received:
    """A request as it came, and what became of it. Times are on the running loop's clock, in seconds."""

    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytes
    body: Any
    """The parsed JSON; None when it is none."""
    at: float
    bytes_sent: int = 0
    packets_sent: int = 0
    tokens_sent: int = 0
    left_at: float | None = None
    """When the client was seen to have left while a reply was being played; None where it hasn't."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with `left_at`."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the reply is over, however it ended."""
    connection: tuple[str, int] | None = None
    """The client's address: equal for requests on one connection."""
    target: str = ""
    """The path with its query, as it came."""
    query: Mapping[str, str] = field(default_factory=dict)
    """What follows the `?`; of a name that is there twice, the first."""
    form: Sequence[Part] | None = None
    """The parts of a multipart form; its bytes are not kept: `raw` is empty then. None for anything else."""

    @property
    def prompt(self) -> str:
        """What is asked for: the text of the last message of a conversation, else the field `prompt` or
        `text` of the body or of its `input`. Of a form such a field, else the SHA-256 of its file in
        hexadecimal digits, as a sound has no words: `when(sha256(sound).hexdigest(), …)`. Else empty."""
        if self.form is not None:
            return _asked({part.name: part.text for part in self.form}) or next(
                (part.sha256 for part in self.form if part.text is None), ""
            )
        if not isinstance(self.body, dict):
            return ""
        messages = self.body.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, dict):
            wanted = self.body.get("input")
            return _asked(wanted if isinstance(wanted, dict) else self.body)
        content = last.get("content")
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            return " ".join(text for text in texts if isinstance(text, str))
        return content if isinstance(content, str) else ""


def _asked(fields: Mapping[str, Any]) -> str:
    found = (fields.get(name) for name in ("prompt", "text"))
    return next((text for text in found if isinstance(text, str)), "")


Script = Reply | Callable[[Received], Reply]
"""A reply, or what makes one for a request."""


def plain_refusal(status: int, message: str) -> Reply:
    """A refusal in nobody's own words: a JSON object with a message alone."""
    body = json.dumps({"message": message}).encode()
    return Reply(status, {"Content-Type": "application/json"}, (body,))


@dataclass(frozen=True, slots=True)
class Wording:
    """How a vendor words its own faults at one kind of task.

    `said` plays a fault, by its name in `pomelo.testing.faults`; `lacks` tells of one that this vendor can't
    have why it can't.
    """

    said: Mapping[str, Script] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wire:
    """A vendor's wire: what the server needs to play it.

    `serves` tells a vendor's requests by their method and path; `refused` gives the vendor's refusal of a
    request that it would not take (with None any key will do), `default` answers one that it would.

    The rest is for `pomelo.testing.faults` alone: `refusal` makes the vendor's error body of a status and a
    message that tells nothing else; `wordings` has the vendor's own faults by the kind of task.
    """

    name: str
    serves: Callable[[Received], bool]
    refused: Callable[[Received, str | None], Reply | None]
    default: Script
    refusal: Callable[[int, str], Reply] = plain_refusal
    wordings: Mapping[str, Wording] = field(default_factory=dict)
