"""Words that must never be seen where they don't belong, and vendors who say them back in every way.

A canary is put where a key, a prompt, a body, a sound, a file's name or a vendor's answer is. `found` counts
them in anything. `FAULTS` are the ways in which a vendor goes wrong while it says back all that it was sent.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing import (
    Gate,
    Received,
    Reply,
    Script,
    Stop,
    Transcript,
    anthropic_protocol,
    mistral_protocol,
)
from pomelo.testing.openai_protocol import Answer
from pomelo.testing.upstream import PROTOCOLS

CANARY = "Canary5d1f"
NAMED = "Namely7c2e"
"""Where a caller names a field or a model: the refusal says the name back to this caller, as it should, but
no log and no file does."""

VENDORS = ("openai", "anthropic", "mistral", "bfl", "together", "replicate", "elevenlabs")


def _forms(word: str) -> tuple[bytes, ...]:
    """A word as it is, and as base64 has it, wherever it stands in what was encoded."""
    encoded = [base64.b64encode(b"\0" * shift + word.encode()) for shift in range(3)]
    inner = [code[4 if shift else 0 : -4] for shift, code in enumerate(encoded)]
    return (word.lower().encode(), word[::-1].lower().encode(), *(code.lower() for code in inner))


_FORMS = {word: _forms(word) for word in (CANARY, NAMED)}


def found(data: bytes | str, *words: str) -> int:
    """How often the canary (or `words`) is in there, in any case, also within base64."""
    given = (data.encode("utf-8", "replace") if isinstance(data, str) else data).lower()
    return sum(given.count(form) for word in words or (CANARY,) for form in _FORMS[word])


def keys() -> dict[str, str]:
    """Every vendor's variable with a key that is a canary."""
    return {f"{vendor.upper()}_API_KEY": f"{CANARY}-key-of-{vendor}" for vendor in VENDORS}


SOUND = f"OggS{CANARY}-sound ".encode() * 2000
_VOICE = "pNInz6obpgDQGcFmaJgB"
_MESSAGES = [
    {"role": "system", "content": f"{CANARY}-system"},
    {"role": "user", "content": f"{CANARY}-prompt"},
]
_PICTURE = b"\x89PNG\r\n\x1a\n" + f"{CANARY}-picture".encode()
_DATA_URI = "data:image/png;base64," + base64.b64encode(_PICTURE).decode()
_SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": f"{CANARY}-part"},
            {"type": "image_url", "image_url": {"url": _DATA_URI}},
        ],
    }
]
_HEARD = base64.b64encode(SOUND).decode()

TASKS: Mapping[str, dict[str, Any]] = {
    "gpt-4": {"messages": _MESSAGES, "user": f"{CANARY}-user", "stop": [f"{CANARY}-stop"]},
    "claude-3-haiku": {"messages": _SEEN, "user": f"{CANARY}-user"},
    "mixtral-8x7b": {"messages": _MESSAGES, "user": f"{CANARY}-user"},
    "flux-1-pro": {"prompt": f"{CANARY}-painting", "response_format": "b64_json"},
    "flux-1-schnell": {"prompt": f"{CANARY}-painting", "response_format": "b64_json"},
    "eleven-labs-tts": {"text": f"{CANARY}-text", "voice": _VOICE},
    "eleven-labs-sts": {"audio": _HEARD, "voice": _VOICE},
    "eleven-labs-stt": {"audio": _HEARD},
}
"""A task for every route of every vendor, full of canaries."""


def answers(received: Received) -> Reply:
    """A good answer, with canaries where the caller will find them."""
    wire = next(wire for wire in PROTOCOLS if wire.serves(received))
    said = f"{CANARY}-answer in a few words"
    match wire.name:
        case "openai":
            return Answer(said)(received)
        case "anthropic":
            return anthropic_protocol.Answer(said)(received)
        case "mistral":
            return mistral_protocol.Answer(said)(received)
        case "elevenlabs" if received.path.endswith("/speech-to-text"):
            return Transcript(said)(received)
        case "elevenlabs":
            return Reply(headers={"Content-Type": "audio/mpeg"}, steps=(b"ID3\4" + said.encode(),))
    script = wire.default
    return script if isinstance(script, Reply) else script(received)


def echo(received: Received) -> str:
    """All that came: the headers with the key in them, the body, the form."""
    form = [f"{part.text} {part.filename} {part.head!r}" for part in received.form or ()]
    return f"{CANARY}-echo {dict(received.headers)} {received.raw.decode('latin-1')} {form}"


def _key(received: Received) -> str:
    return f"{CANARY}-code"  # looks like a code of the vendor's; see `failures`


def _complaint(received: Received, code: str | None = None) -> bytes:
    """Everything that any vendor's error body may have, with the echo in all of it."""
    said = echo(received)
    error = {"message": said, "type": code or said, "code": code or said, "param": said, "loc": [said]}
    return json.dumps(
        {**error, "error": error, "detail": {**error, "status": said}, "title": said, "errors": [said]}
    ).encode()


def _headers(content_type: str = "application/json", **more: str) -> dict[str, str]:
    return {
        "Content-Type": content_type,
        "x-request-id": f"{CANARY}-request-id",
        "request-id": f"{CANARY}-request-id",
        "Set-Cookie": f"session={CANARY}-cookie",
        "Server": f"{CANARY}-server",
    } | {name.replace("_", "-"): value for name, value in more.items()}


def _status(status: int, **more: str) -> Script:
    return lambda received: Reply(status, _headers(**more), (_complaint(received),))


def _with(content_type: str, *steps: Any, status: int = 200, **more: str) -> Script:
    """An answer of steps; a string among them is formatted with the echo."""

    def script(received: Received) -> Reply:
        said = echo(received)
        filled = [s.replace("ECHO", said).encode() if isinstance(s, str) else s for s in steps]
        return Reply(status, _headers(content_type, **more), tuple(filled))

    return script


def _raw(*steps: Any) -> Script:
    """Bytes in place of HTTP, and the end."""
    return Reply(before=(*steps, Stop.CLOSE))


_ELSEWHERE = f"https://10.0.0.1/{CANARY}-link"
_ASTRAY = {
    "id": f"{CANARY}-id",
    "polling_url": _ELSEWHERE,
    "status": "succeeded",
    "urls": {"get": _ELSEWHERE},
    "output": [_ELSEWHERE],
    "data": [{"url": _ELSEWHERE}],
    "result": {"sample": _ELSEWHERE},
}
_EVENTS = "text/event-stream"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_WORD = f"{CANARY}-raw ".encode()


@dataclass(frozen=True, slots=True)
class Fault:
    """A way to go wrong. `tries` is how often it is met by one call, where it opens a route's breaker in the
    end; 0: it doesn't. `timeout` is the caller's, in seconds."""

    script: Script
    tries: int = 0
    timeout: float = 10.0


FAULTS: Mapping[str, Fault] = {
    **{str(status): Fault(_status(status)) for status in (400, 401, 402, 403, 404, 413, 418, 422)},
    **{str(status): Fault(_status(status, retry_after="60"), 1) for status in (429, 500, 503)},
    "a code that looks like one": Fault(
        lambda received: Reply(400, _headers(), (_complaint(received, _key(received)),))
    ),
    "a wait that is none": Fault(_status(409, retry_after=f"{CANARY}-wait"), 3),
    "a page": Fault(_with("text/html", "<html><title>ECHO</title>")),
    "a page with an error": Fault(_with("text/html", "<html>ECHO", status=403)),
    "half of an object": Fault(_with("application/json", '{"choices": [{"message": {"content": "ECHO')),
    "another shape": Fault(_with("application/json", json.dumps({"choices": ["ECHO"], "text": ["ECHO"]}))),
    "links that lead astray": Fault(_with("application/json", json.dumps(_ASTRAY))),
    "an error in place of an answer": Fault(lambda r: Reply(headers=_headers(), steps=(_complaint(r),))),
    "a list": Fault(_with("application/json", '["ECHO"]')),
    "a redirect": Fault(
        _with("text/plain", "ECHO", status=302, location=f"/{CANARY}-elsewhere?key={CANARY}")
    ),
    "compressed unasked": Fault(_with("application/json", "ECHO", content_encoding=f"{CANARY}-coding")),
    "an error event": Fault(
        _with(
            _EVENTS, 'event: error\ndata: {"type": "error", "error": {"type": "ECHO", "message": "ECHO"}}\n\n'
        )
    ),
    "an event that is no JSON": Fault(_with(_EVENTS, "data: ECHO\n\n")),
    "an event that is no UTF-8": Fault(_with(_EVENTS, b'data: {"error": "' + _WORD + b'\xc3"}\n\n')),
    "a huge event": Fault(_with(_EVENTS, b"data: " + _WORD * 100_000 + b"\n\n")),
    "cut within an event": Fault(_with(_EVENTS, "data: ECHO", Stop.RESET)),
    "cut within an object": Fault(_with("application/json", '{"ECHO', Stop.CLOSE)),
    "no HTTP": Fault(_raw(_WORD * 5 + b"\r\n\r\n")),
    "a bad chunk": Fault(_raw(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + _WORD + b"\r\n")),
    "a bad header": Fault(_raw(_HEAD + _WORD + b"\r\n\r\n")),
    "a huge header": Fault(_raw(_HEAD + b"X-Huge: " + _WORD * 5000 + b"\r\n\r\n")),
    "too short": Fault(_raw(_HEAD + b"Content-Length: 5000\r\n\r\n" + _WORD)),
    "closed": Fault(_raw(), 3),
    "silence": Fault(Reply(before=(Gate(),)), timeout=0.3),
    "silence half way": Fault(_with("application/json", '{"ECHO', Gate()), timeout=0.3),
}
