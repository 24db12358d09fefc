"""OpenAI's chat completions as the vendor's side speaks them: answers, whole and streamed, and its refusals.

`FaultUpstream` asks `refused` first; what a test scripts is mostly an `Answer`. The facts are those of the
vendor's published API description; what its requests must look like is in `openai_checks`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pomelo.testing.openai_checks import check
from pomelo.testing.reply import Received, Reply, Step, Token, Wire

PATH = "/v1/chat/completions"

_ID = "chatcmpl-test0001"
_CREATED = 1_790_000_000
_JSON = {"Content-Type": "application/json"}
_WORD = re.compile(r"\s*\S+|\s+\Z")

COUNTED: Mapping[str, int] = {}
"""As the `usage` of an Answer: what it really has, counted by words."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A script: answers a conversation with `text`, whole or streamed as the request asks.

    A stream has a chunk for the role, one for each word, one for the finish_reason, one for the usage (where
    the request asks for it), and the end marker. `at` puts steps behind the given number of words: {0: …} is
    ahead of the first, {2: Gate()} stalls after two, {2: Stop.RESET} cuts there; any bytes among them are
    sent as they are. In a whole answer the steps of 0 come ahead of the body, all others in its middle.
    `before` is ahead of the head.

    `finish_reason` None leaves it out, as do `usage` None and `done` False the usage and the end marker; a
    `refusal` comes in place of the text. `packing` sends an event, everything up to the next other step, or a
    single byte in each packet; `line_end` and `comments` vary the form of the events.
    """

    text: str = "Hello from the upstream."
    finish_reason: str | None = "stop"
    usage: Any = field(default_factory=lambda: COUNTED)
    refusal: str | None = None
    done: bool = True
    at: Mapping[int, Step | Sequence[Step]] = field(default_factory=dict)
    before: tuple[Step, ...] = ()
    packing: Literal["events", "together", "bytes"] = "events"
    line_end: bytes = b"\n"
    comments: bool = False

    def __call__(self, received: Received) -> Reply:
        """The reply to a request."""
        if received.body.get("stream"):
            headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            return Reply(headers=headers, before=self.before, steps=tuple(self._packed(received)))
        return Reply(headers=_JSON, before=self.before, steps=tuple(self._whole(received)))

    def _usage(self, received: Received) -> Any:
        if self.usage is not COUNTED:
            return self.usage
        messages = received.body["messages"]
        prompt = sum(len(str(message.get("content") or "").split()) for message in messages)
        completion = len((self.refusal or self.text).split())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }

    def _whole(self, received: Received) -> list[Step]:
        message = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        if self.refusal is not None:
            message["content"] = None
        answer: dict[str, Any] = {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": received.body["model"],
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
            ],
            "service_tier": "default",
            "system_fingerprint": None,
        }
        usage = self._usage(received)
        if usage is not None:
            answer["usage"] = usage
        body = json.dumps(answer, ensure_ascii=False).encode()
        middle = [step for number, steps in self.at.items() if number for step in _listed(steps)]
        half = len(body) // 2 if middle else len(body)
        packets: list[Step] = [Token(body[:half])]
        return [*_listed(self.at.get(0, ())), *packets, *middle, *([body[half:]] if middle else [])]

    def _streamed(self, received: Received) -> list[Step]:
        model = received.body["model"]
        options = received.body.get("stream_options") or {}
        veiled = options.get("include_obfuscation", True)
        key = "content" if self.refusal is None else "refusal"
        steps: list[Step] = [chunk({"role": "assistant", "content": "", "refusal": None}, model=model)]
        steps += _listed(self.at.get(0, ()))
        for number, word in enumerate(_WORD.findall(self.refusal or self.text), 1):
            veil = {"obfuscation": "x" * (number % 7)} if veiled else {}
            steps.append(Token(chunk({key: word}, model=model, **veil)))
            steps += _listed(self.at.get(number, ()))
        if self.finish_reason is not None:
            steps.append(chunk({}, finish_reason=self.finish_reason, model=model))
        usage = self._usage(received)
        if options.get("include_usage") and usage is not None:
            steps.append(chunk(None, usage=usage, model=model))
        if self.done:
            steps.append(b"data: [DONE]\n\n")
        return steps

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


def chunk(
    delta: Mapping[str, Any] | None,
    *,
    finish_reason: str | None = None,
    usage: Any = None,
    model: str = "gpt-4.1",
    **more: Any,
) -> bytes:
    """One event of a stream; `delta` None makes one without choices, as the one with the usage is."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    body = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": [] if delta is None else [choice],
        "usage": usage,
    }
    return b"data: " + json.dumps(body | more, ensure_ascii=False).encode() + b"\n\n"


def error_event(kind: str = "server_error", code: str | None = None, message: str = "It broke") -> bytes:
    """A failure within a stream, to be put `at` a place of an Answer; nothing should follow but Stop.END."""
    return b"data: " + json.dumps(_error(message, kind, None, code)).encode() + b"\n\n"


def broken_json() -> bytes:
    """An event whose data is no JSON."""
    return b'data: {"choices":[{"delta":\n\n'


def half_character() -> bytes:
    """An event that is cut within a character: no UTF-8, in otherwise sound JSON."""
    return b'data: {"choices":[{"index":0,"delta":{"content":"caf\xc3"},"finish_reason":null}]}\n\n'


def huge_line(size: int = 1_000_000) -> bytes:
    """An event of `size` bytes in one line."""
    return chunk({"content": "x" * size})


def error_reply(
    status: int,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    message: str = "It can't be done",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """A refusal with the vendor's error body; `kind` is its `type`."""
    body = json.dumps(_error(message, kind, param, code)).encode()
    return Reply(
        status=status, headers={**_JSON, "x-request-id": "req_test0001", **(headers or {})}, steps=(body,)
    )


def page(status: int = 200) -> Reply:
    """What a proxy in between answers: a page for people."""
    return Reply(
        status=status,
        headers={"Content-Type": "text/html; charset=utf-8"},
        steps=(b"<!doctype html><title>Welcome</title><p>Sign in to the network.\n\n",),
    )


def redirect(location: str, status: int = 307) -> Reply:
    """Sends the client elsewhere."""
    return Reply(status=status, headers={"Location": location})


def refused(received: Received, api_key: str | None) -> Reply | None:
    """The vendor's refusal of a request that it would not take; None for one that it would.

    With `api_key` None any key will do, but there must be one.
    """
    if received.path != PATH:
        return error_reply(404, message="Unknown request URL")
    if received.method != "POST":
        return error_reply(405, code="method_not_supported", message="Only POST is allowed here")
    scheme, _, key = received.headers.get("Authorization", "").partition(" ")
    if scheme != "Bearer" or not key:
        return error_reply(401, message="A key is needed, as a bearer")
    if api_key is not None and key != api_key:
        return error_reply(401, code="invalid_api_key", message="The key is unknown")
    if received.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
        return error_reply(415, code="unsupported_content_type", message="Send JSON")
    if not isinstance(received.body, dict):
        return error_reply(400, message="The body is no JSON object")
    problem = check(received.body)
    if problem is not None:
        return error_reply(400, code=problem.code, param=problem.param, message=problem.message)
    return None


WIRE = Wire("openai", lambda received: received.path == PATH, refused, Answer())


def _error(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _listed(steps: Step | Sequence[Step]) -> list[Step]:
    if isinstance(steps, bytes) or not isinstance(steps, Sequence):
        return [steps]
    return list(steps)
