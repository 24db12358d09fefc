"""A vendor for tests: a real HTTP server on loopback that speaks a vendor's wire and misbehaves on request.

    async with FaultUpstream() as upstream:
        client = AsyncOpenAI(base_url=upstream.openai_base_url, api_key="any")
        gate = Gate()
        upstream.script(Answer("one two three", at={2: gate}))  # goes silent after two words

It ships with Pomelo for the tests of its users, of their clients as well as of new providers. It knows
nothing of Pomelo, and no test needs to sleep: a `Gate` holds an answer where it is told to, and what the
server saw is awaited on the `Received` request. A vendor of one's own is a `Wire`: `FaultUpstream(wires=…)`.

`pomelo.testing.faults` is the table of what can go wrong at a vendor, and `pomelo.testing.suite`, which alone
knows Pomelo, the contract that every provider is run through.
"""

from __future__ import annotations

from pomelo.testing.elevenlabs_wire import Speech, Transcript, VoiceList
from pomelo.testing.form import Part
from pomelo.testing.openai_wire import (
    Answer,
    broken_json,
    chunk,
    error_event,
    error_reply,
    half_character,
    huge_line,
    page,
    redirect,
)
from pomelo.testing.reply import (
    Gate,
    Received,
    Reply,
    Script,
    Step,
    Stop,
    Token,
    Wire,
    Wording,
    plain_refusal,
)
from pomelo.testing.upstream import FaultUpstream

__all__ = [
    "Answer",
    "FaultUpstream",
    "Gate",
    "Part",
    "Received",
    "Reply",
    "Script",
    "Speech",
    "Step",
    "Stop",
    "Token",
    "Transcript",
    "VoiceList",
    "Wire",
    "Wording",
    "broken_json",
    "chunk",
    "error_event",
    "error_reply",
    "half_character",
    "huge_line",
    "page",
    "plain_refusal",
    "redirect",
]
