"""A fake vendor for tests: a real HTTP server on loopback that speaks a vendor's protocol and fails on
request.

    async with FaultUpstream() as upstream:
        client = AsyncOpenAI(base_url=upstream.openai_base_url, api_key="any")
        gate = Gate()
        upstream.script(Answer("one two three", at={2: gate}))  # stalls after two words

It ships with Pomelo for the tests of users, of their clients as well as of their providers. No test needs to
sleep: a `Gate` holds a response at a given place, and tests await what the server saw on the `Received`
request. Other vendors can be added as a `VendorProtocol`: `FaultUpstream(protocols=…)`.

`pomelo.testing.faults` is the table of what can go wrong at a vendor. `pomelo.testing.suite` is the contract
that every provider is tested against.
"""

from __future__ import annotations

from pomelo.testing.elevenlabs_protocol import Speech, Transcript, VoiceList
from pomelo.testing.form import Part
from pomelo.testing.openai_protocol import (
    Answer,
    broken_json,
    chunk,
    error_event,
    error_reply,
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
    VendorFaults,
    VendorProtocol,
    plain_refusal,
)
from pomelo.testing.text_answer import Call
from pomelo.testing.upstream import FaultUpstream

__all__ = [
    "Answer",
    "Call",
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
    "VendorFaults",
    "VendorProtocol",
    "VoiceList",
    "broken_json",
    "chunk",
    "error_event",
    "error_reply",
    "page",
    "plain_refusal",
    "redirect",
]
