"""Results and models as the JSON that REST callers get: whole answers, and the pieces of streams.

Called by `gateway.task`, `sse` and the routes. Built by hand from the messages; it looks at what a
message holds, never at what was asked.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic_core import to_json

from pomelo import money
from pomelo.gen.v1.model_service_pb2 import Model, PriceUnit
from pomelo.gen.v1.speech_pb2 import Transcription
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType
from pomelo.gen.v1.task_service_pb2 import TaskStarted
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, TokenUsage

Link = Callable[[str], str]
"""Makes the link that the caller gets of the one that the engine made."""

TYPES: Mapping[int, str] = {
    TaskType.TASK_TYPE_TEXT: "text",
    TaskType.TASK_TYPE_IMAGE: "image",
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: "text-to-speech",
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: "speech-to-speech",
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: "speech-to-text",
}
"""The kinds of task by the names that the documentation uses."""

_FINISH: Mapping[int, str] = {
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_LENGTH: "length",
    FinishReason.FINISH_REASON_CONTENT_FILTER: "content_filter",
}


def link_to(public_url: str) -> Link:
    """What puts media links onto `public_url`; empty leaves them as they are."""
    base = public_url.rstrip("/")
    if not base:
        return str

    def link(url: str) -> str:
        at = url.find("/media/")
        return url if at < 0 else base + url[at:]

    return link


def result(made: TaskResult, link: Link) -> bytes:
    """A result as the JSON object of its kind."""
    output = made.WhichOneof("output")
    if output == "text":
        text = made.text
        return to_json(
            {
                "id": made.id,
                "object": "task.completion",
                "created": made.created.seconds,
                "model": made.model,
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text.content},
                        "finish_reason": _FINISH.get(text.finish_reason),
                    }
                ],
                "usage": _usage(text.usage),
            }
        )
    if output == "image":
        pictures = b",".join(
            _medium(link(p.media.url) if p.HasField("media") else "", p.data) for p in made.image.images
        )
        return _head(made, "image.generation") + b',"data":[' + pictures + b"]}"
    if output == "speech":
        speech = made.speech
        url = link(speech.media.url) if speech.HasField("media") else ""
        return _head(made, "speech.generation") + b',"audio":' + _medium(url, speech.data) + b"}"
    if output == "transcription":
        return to_json(_transcription(made, made.transcription))
    raise ValueError("a result without an output")


def _head(made: TaskResult | TaskStarted, kind: str) -> bytes:
    # An object that is still open: the caller adds a member and closes it.
    fields = {"id": made.id, "object": kind, "created": made.created.seconds, "model": made.model}
    return to_json(fields)[:-1]


def _medium(url: str, data: bytes) -> bytes:
    # By hand: the base64 of a picture is megabytes, which need no look for characters to escape.
    members = []
    if url:
        members.append(b'"url":' + to_json(url))
    if data:
        members.append(b'"b64_json":"' + binascii.b2a_base64(data, newline=False) + b'"')
    return b"{" + b",".join(members) + b"}"


def _usage(usage: TokenUsage) -> dict[str, Any]:
    """Counts of tokens; those of the vendor's cache only where it had a part in it."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
    cached, written = usage.cached_prompt_tokens, usage.cache_write_prompt_tokens
    if cached or written:
        counts["prompt_tokens_details"] = {"cached_tokens": cached, "cache_write_tokens": written}
    return counts


def _transcription(made: TaskResult, script: Transcription) -> dict[str, Any]:
    return {
        "id": made.id,
        "object": "speech.transcription",
        "created": made.created.seconds,
        "model": made.model,
        "text": script.text,
        "language": script.language,
        "words": [
            {"text": word.text, "start": word.start, "end": word.end, "speaker": word.speaker or None}
            for word in script.words
        ],
    }


class Pieces:
    """The objects of one task's stream; all that is the same in each of them is rendered once."""

    __slots__ = ("_made", "_openings", "_role")

    def __init__(self, started: TaskStarted) -> None:
        self._made = started
        self._openings: dict[str, bytes] = {}
        self._role = b'"role":"assistant",'

    def _opening(self, kind: str, rest: bytes) -> bytes:
        opening = self._openings.get(kind)
        if opening is None:
            opening = self._openings[kind] = _head(self._made, kind) + rest
        return opening

    def text(self, content: str) -> bytes:
        """A `task.completion.chunk` of text; the first one bears the role."""
        opening = self._opening("task.completion.chunk", b',"choices":[{"index":0,"delta":{')
        role, self._role = self._role, b""
        return b"".join((opening, role, b'"content":', to_json(content), b'},"finish_reason":null}]}'))

    def last_text(self, delta: TextDelta) -> bytes:
        """The last `task.completion.chunk`, with finish_reason and usage."""
        opening = self._opening("task.completion.chunk", b',"choices":[{"index":0,"delta":{')
        role, self._role = self._role, b""
        content = b'"content":' + to_json(delta.content) if delta.content or role else b""
        return b"".join(
            (
                opening,
                role,
                content,
                b'},"finish_reason":',
                to_json(_FINISH.get(delta.finish_reason)),
                b'}],"usage":',
                to_json(_usage(delta.usage)),
                b"}",
            )
        )

    def sound(self, data: bytes) -> bytes:
        """A `speech.generation.chunk`."""
        opening = self._opening("speech.generation.chunk", b',"audio":{"b64_json":"')
        return opening + binascii.b2a_base64(data, newline=False) + b'"}}'

    def progress(self, progress: float) -> bytes:
        """An `image.progress`."""
        return self._opening("image.progress", b',"progress":') + to_json(progress) + b"}"


def model(entry: Model) -> dict[str, Any]:
    """A model, its price in credits as decimal text."""
    limits = {f.name: value for f, value in entry.limits.ListFields()}
    fields = {
        "id": entry.name,
        "object": "model",
        "type": TYPES.get(entry.task_type, "unknown"),
        "limits": limits,
        "price": _price(entry.prices),
        "price_version": entry.price_version,
        "available": entry.available,
        "deprecated": _day(entry.deprecate_time),
        "retires": _day(entry.retire_time),
    }
    if entry.price_tiers:
        fields["price_tiers"] = [
            {"from_input_tokens": tier.from_input_tokens, "price": _price(tier.prices)}
            for tier in entry.price_tiers
        ]
    return fields


def _price(lines: Any) -> dict[str, str]:
    """Credits for each unit, as decimal text."""
    return {_unit(price.unit): money.format_credits(price.amount_micros) for price in lines}


def _day(time: Timestamp) -> str | None:
    """A date such as 2026-12-31; None for no time."""
    return time.ToDatetime().date().isoformat() if time.seconds else None


def _unit(unit: int) -> str:
    known: Any = PriceUnit
    value = known.DESCRIPTOR.values_by_number.get(unit)
    return value.name.removeprefix("PRICE_UNIT_").lower() if value is not None else f"unit_{unit}"
