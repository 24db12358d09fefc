"""Markers that must not leak, and vendors that echo them in every way.

Every key, prompt, body, audio file, file name and vendor response contains a marker. `count_markers` counts
them in any data. `FAULTS` are faults of a vendor that echoes everything it was sent.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing import (
    FaultUpstream,
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

MARKER = "Marker5d1f"
NAME_MARKER = "Namely7c2e"
"""The marker in names of fields and models: an error may repeat it to the caller, but no log and no file."""
LABEL_MARKER = "Labelled3a9f"
"""The marker in a task's user and metadata: only the usage record may have it."""
MARKERS = (MARKER, NAME_MARKER, LABEL_MARKER)

VENDORS = ("openai", "anthropic", "mistral", "bfl", "together", "replicate", "elevenlabs")


def _forms(word: str) -> tuple[bytes, ...]:
    """A word as it is, reversed, and in base64 at any offset."""
    encoded = [base64.b64encode(b"\0" * shift + word.encode()) for shift in range(3)]
    inner = [code[4 if shift else 0 : -4] for shift, code in enumerate(encoded)]
    return (word.lower().encode(), word[::-1].lower().encode(), *(code.lower() for code in inner))


_FORMS = {word: _forms(word) for word in MARKERS}


def count_markers(data: bytes | str, *markers: str) -> int:
    """Counts MARKER and LABEL_MARKER, or these `markers`, in the data: in any case, and within base64."""
    content = (data.encode("utf-8", "replace") if isinstance(data, str) else data).lower()
    return sum(content.count(form) for marker in markers or (MARKER, LABEL_MARKER) for form in _FORMS[marker])


def keys() -> dict[str, str]:
    """The environment variables of all vendors' keys; each key contains a marker."""
    return {f"{vendor.upper()}_API_KEY": f"{MARKER}-key-of-{vendor}" for vendor in VENDORS}


def base_urls(upstream: FaultUpstream) -> dict[str, str]:
    """The environment variables of all vendors' base URLs."""
    return {f"{vendor.upper()}_BASE_URL": getattr(upstream, f"{vendor}_base_url") for vendor in VENDORS}


AUDIO = f"OggS{MARKER}-audio ".encode() * 200
_VOICE = "pNInz6obpgDQGcFmaJgB"
_MESSAGES = [
    {"role": "system", "content": f"{MARKER}-system"},
    {"role": "user", "content": f"{MARKER}-prompt"},
]
_IMAGE = b"\x89PNG\r\n\x1a\n" + f"{MARKER}-image".encode()
_DATA_URI = "data:image/png;base64," + base64.b64encode(_IMAGE).decode()
_MESSAGES_WITH_IMAGE = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": f"{MARKER}-part"},
            {"type": "image_url", "image_url": {"url": _DATA_URI}},
        ],
    }
]
_AUDIO = base64.b64encode(AUDIO).decode()

TASKS: Mapping[str, dict[str, Any]] = {
    "gpt-4": {"messages": _MESSAGES, "user": f"{LABEL_MARKER}-user", "stop": [f"{MARKER}-stop"]},
    "claude-3-haiku": {"messages": _MESSAGES_WITH_IMAGE, "user": f"{LABEL_MARKER}-user"},
    "mixtral-8x7b": {"messages": _MESSAGES, "user": f"{LABEL_MARKER}-user"},
    "flux-1-pro": {"prompt": f"{MARKER}-painting", "response_format": "b64_json"},
    "flux-1-schnell": {"prompt": f"{MARKER}-painting", "response_format": "b64_json"},
    "eleven-labs-tts": {"text": f"{MARKER}-text", "voice": _VOICE},
    "eleven-labs-sts": {"audio": _AUDIO, "voice": _VOICE},
    "eleven-labs-stt": {"audio": _AUDIO},
}
"""A task for every route of every vendor, with markers."""


def answers(received: Received) -> Reply:
    """A good answer, with markers in the output."""
    protocol = next(protocol for protocol in PROTOCOLS if protocol.serves(received))
    text = f"{MARKER}-answer in a few words"
    match protocol.name:
        case "openai":
            return Answer(text)(received)
        case "anthropic":
            return anthropic_protocol.Answer(text)(received)
        case "mistral":
            return mistral_protocol.Answer(text)(received)
        case "elevenlabs" if received.path.endswith("/speech-to-text"):
            return Transcript(text)(received)
        case "elevenlabs":
            return Reply(headers={"Content-Type": "audio/mpeg"}, steps=(b"ID3\4" + text.encode(),))
    script = protocol.default
    return script if isinstance(script, Reply) else script(received)


def echo(received: Received) -> str:
    """Everything that was received: the headers with the key, the body, the form."""
    form = [f"{part.text} {part.filename} {part.head!r}" for part in received.form or ()]
    return f"{MARKER}-echo {dict(received.headers)} {received.raw.decode('latin-1')} {form}"


def _error_body(received: Received, code: str | None = None) -> bytes:
    """An error body with the fields of all vendors, and the echo in each."""
    text = echo(received)
    error = {"message": text, "type": code or text, "code": code or text, "param": text, "loc": [text]}
    return json.dumps(
        {**error, "error": error, "detail": {**error, "status": text}, "title": text, "errors": [text]}
    ).encode()


def _headers(content_type: str = "application/json", **more: str) -> dict[str, str]:
    return (
        {
            "Content-Type": content_type,
            "x-request-id": "logged-request-id",  # which the operator needs; text that can't be an id is not logged
            "request-id": f"{MARKER} request id",
            "Set-Cookie": f"session={MARKER}-cookie",
            "Server": f"{MARKER}-server",
        }
        | {name.replace("_", "-"): value for name, value in more.items()}
    )


def _status(status: int, **more: str) -> Script:
    return lambda received: Reply(status, _headers(**more), (_error_body(received),))


def _with(content_type: str, *steps: Any, status: int = 200, **more: str) -> Script:
    """A response of these steps; ECHO in a string is replaced by the echo."""

    def script(received: Received) -> Reply:
        text = echo(received)
        filled = [step.replace("ECHO", text).encode() if isinstance(step, str) else step for step in steps]
        return Reply(status, _headers(content_type, **more), tuple(filled))

    return script


def _raw(*steps: Any) -> Script:
    """Bytes without HTTP, and the end of the connection."""
    return Reply(before=(*steps, Stop.CLOSE))


_PRIVATE_URL = f"https://10.0.0.1/{MARKER}-link"
_PRIVATE_LINKS = {
    "id": f"{MARKER}-id",
    "polling_url": _PRIVATE_URL,
    "status": "succeeded",
    "urls": {"get": _PRIVATE_URL},
    "output": [_PRIVATE_URL],
    "data": [{"url": _PRIVATE_URL}],
    "result": {"sample": _PRIVATE_URL},
}
_EVENTS = "text/event-stream"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_WORD = f"{MARKER}-raw ".encode()


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a vendor. `failures` is the number of failures that the route's circuit breaker counts for
    one call. `timeout` is the caller's, in seconds."""

    script: Script
    failures: int = 0
    timeout: float = 10.0


FAULTS: Mapping[str, Fault] = {
    **{str(status): Fault(_status(status)) for status in (400, 401, 402, 403, 404, 413, 418, 422)},
    **{str(status): Fault(_status(status, retry_after="60"), 1) for status in (429, 500, 503)},
    "a code like the vendor's": Fault(
        lambda received: Reply(400, _headers(), (_error_body(received, "logged-code"),))
    ),
    "an invalid wait": Fault(_status(409, retry_after=f"{MARKER}-wait"), 3),
    "HTML": Fault(_with("text/html", "<html><title>ECHO</title>")),
    "HTML with an error": Fault(_with("text/html", "<html>ECHO", status=403)),
    "half of an object": Fault(_with("application/json", '{"choices": [{"message": {"content": "ECHO')),
    "other fields": Fault(_with("application/json", json.dumps({"choices": ["ECHO"], "text": ["ECHO"]}))),
    "private links": Fault(_with("application/json", json.dumps(_PRIVATE_LINKS))),
    "an error with 200": Fault(lambda r: Reply(headers=_headers(), steps=(_error_body(r),))),
    "a list": Fault(_with("application/json", '["ECHO"]')),
    "a redirect": Fault(_with("text/plain", "ECHO", status=302, location=f"/{MARKER}-location?key={MARKER}")),
    "unrequested compression": Fault(_with("application/json", "ECHO", content_encoding=f"{MARKER}-coding")),
    "an error event": Fault(
        _with(
            _EVENTS, 'event: error\ndata: {"type": "error", "error": {"type": "ECHO", "message": "ECHO"}}\n\n'
        )
    ),
    "an event that is not JSON": Fault(_with(_EVENTS, "data: ECHO\n\n")),
    "an event that is not UTF-8": Fault(_with(_EVENTS, b'data: {"error": "' + _WORD + b'\xc3"}\n\n')),
    "a huge event": Fault(_with(_EVENTS, b"data: " + _WORD * 100_000 + b"\n\n")),
    "cut within an event": Fault(_with(_EVENTS, "data: ECHO", Stop.RESET)),
    "cut within an object": Fault(_with("application/json", '{"ECHO', Stop.CLOSE)),
    "not HTTP": Fault(_raw(_WORD * 5 + b"\r\n\r\n")),
    "a bad chunk": Fault(_raw(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + _WORD + b"\r\n")),
    "a bad header": Fault(_raw(_HEAD + _WORD + b"\r\n\r\n")),
    "a huge header": Fault(_raw(_HEAD + b"X-Huge: " + _WORD * 5000 + b"\r\n\r\n")),
    "too short": Fault(_raw(_HEAD + b"Content-Length: 5000\r\n\r\n" + _WORD)),
    "closed": Fault(_raw(), 3),
    "silence": Fault(Reply(before=(Gate(),)), timeout=0.3),
    "silence half way": Fault(_with("application/json", '{"ECHO', Gate()), timeout=0.3),
}
