"""The three ways into Pomelo, each driven as a user would, with one common form of what came back."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
from google.rpc import error_details_pb2, status_pb2

from pomelo.gen.v1 import image_pb2, media_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub

KINDS = {
    "gpt": "text",
    "claude": "text",
    "mixtral": "text",
    "flux": "image",
    "eleven-labs-tts": "text_to_speech",
    "eleven-labs-sts": "speech_to_speech",
    "eleven-labs-stt": "speech_to_text",
}
FINISH = {1: "stop", 2: "length", 3: "content_filter"}
PREFIX = {"text": "task_", "image": "img_"}


@dataclass
class Ask:
    """One request, in words of neither wire. `body` is the JSON of REST without `stream`."""

    body: dict[str, Any]
    key: str | None
    stream: bool = False
    request_id: str | None = None
    timeout: float | None = None


@dataclass
class Outcome:
    """What came back, freed of what differs by its nature (ids, times, hosts)."""

    code: str = "ok"
    message: str = ""
    output: dict[str, Any] = field(default_factory=dict)
    pieces: int = 0
    status: str = "OK"
    """The HTTP status, or the name of the gRPC status."""
    retry_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


def kind_of(model: object) -> str:
    """The kind of a model by its name; text for what is no model."""
    return next((kind for start, kind in KINDS.items() if str(model).startswith(start)), "text")


def digest(data: bytes) -> str:
    """A short name for bytes."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}"


# --- gRPC


def to_task(body: Mapping[str, Any], *, stream: bool = False) -> Task:
    """The message that says what a REST body says; written by hand, not by the gateway's code."""
    kind = kind_of(body.get("model"))
    task = Task(model=body.get("model", ""))
    rest = {k: v for k, v in body.items() if k != "model"}
    if kind == "text":
        text = task.text
        text.SetInParent()
        for message in rest.pop("messages", []):
            sent = text.messages.add()
            if "role" in message:
                sent.role = text_pb2.Role.Value(f"ROLE_{message['role'].upper()}")
            content = message.get("content")
            if isinstance(content, str):
                sent.content = content
            elif content is not None:
                sent.parts.SetInParent()
                for part in content:
                    if part["type"] == "text":
                        sent.parts.parts.add(text=part["text"])
                    else:
                        sent.parts.parts.add(image_url=text_pb2.ImageUrl(url=part["image_url"]["url"]))
        stop = rest.pop("stop", [])
        text.stop.extend([stop] if isinstance(stop, str) else stop)
        _set(text, rest)
    else:
        given = getattr(task, kind)
        given.SetInParent()
        audio = rest.pop("audio", None)
        if audio is not None and kind != "text_to_speech":
            given.audio.data = base64.b64decode(audio)
        timestamps = rest.pop("timestamps", None)
        if timestamps is not None:
            given.timestamps = speech_pb2.Timestamps.Value(f"TIMESTAMPS_{timestamps.upper()}")
        wanted = rest.pop("response_format", "unspecified" if stream else "both")
        if kind != "speech_to_text":
            given.response_format = media_pb2.ResponseFormat.Value(f"RESPONSE_FORMAT_{wanted.upper()}")
        if kind == "image" and "output_format" in rest:
            form = rest.pop("output_format").upper()
            given.output_format = image_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{form}")
        for name, value in rest.pop("voice_settings", {}).items():
            setattr(given.voice_settings, name, value)
        _set(given, rest)
    return task


def _set(message: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in message.DESCRIPTOR.fields_by_name:
            setattr(message, name, value)


class Grpc:
    """Generated stubs over a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.tasks = TaskServiceStub(channel)
        self.media = MediaServiceStub(channel)

    def metadata(self, ask: Ask) -> list[tuple[str, str]]:
        """What a call bears."""
        pairs = [("authorization", f"Bearer {ask.key}")] if ask.key else []
        return pairs + ([("x-request-id", ask.request_id)] if ask.request_id else [])

    async def __call__(self, ask: Ask) -> Outcome:
        """Asks, and waits for the end."""
        task = to_task(ask.body, stream=ask.stream)
        outcome = Outcome()
        given: dict[str, Any] = {"metadata": self.metadata(ask), "timeout": ask.timeout}
        if ask.stream:
            call = self.tasks.StreamTask(StreamTaskRequest(task=task), **given)
            try:
                await self._stream(call, outcome)
            except grpc.aio.AioRpcError as error:
                _failed(outcome, error)
        else:
            call = self.tasks.RunTask(RunTaskRequest(task=task), **given)
            try:
                await self._result((await call).result, outcome, whole=True)
            except grpc.aio.AioRpcError as error:
                _failed(outcome, error)
        # An accepted stream sends its headers as initial metadata; other calls as trailing metadata.
        told = await call.initial_metadata()
        if "x-request-id" not in told:
            told = await call.trailing_metadata()
        outcome.headers = {str(k): str(v) for k, v in told or ()}
        return outcome

    async def _stream(self, call: Any, outcome: Outcome) -> None:
        text, sound, started = [], [], None
        async for event in call:
            which = event.WhichOneof("event")
            if started is None:
                assert which == "started", which
                started = event.started
                continue
            if which == "text_delta":
                outcome.pieces += bool(event.text_delta.content)
                text.append(event.text_delta.content)
                outcome.output["text"] = "".join(text)
                if event.text_delta.finish_reason:
                    outcome.output |= _ending(event.text_delta)
                    assert started.id.startswith("task_")
            elif which == "audio_chunk":
                sound.append(event.audio_chunk.data)
                outcome.output["sound"] = digest(b"".join(sound))
            elif which == "image_progress":
                outcome.output.setdefault("progress", []).append(event.image_progress.progress)
            else:
                assert event.result.id == started.id
                assert event.result.model == started.model
                await self._result(event.result, outcome, whole=False)

    async def _result(self, result: TaskResult, outcome: Outcome, *, whole: bool) -> None:
        output = outcome.output
        output["model"] = result.model
        which = result.WhichOneof("output")
        if which == "text":
            assert result.id.startswith("task_")
            output |= {"text": result.text.content} | _ending(result.text)
        elif which == "image":
            assert result.id.startswith("img_")
            (image,) = result.image.images
            output |= await self._medium(image.media, image.data, image.content_type)
        elif which == "speech":
            assert result.id.startswith("speech_")
            assert whole or not result.speech.data
            output |= await self._medium(result.speech.media, result.speech.data, result.speech.content_type)
        else:
            assert result.id.startswith("speech_")
            found = result.transcription
            output |= {"text": found.text, "language": found.language}
            output["words"] = [
                {
                    "text": w.text,
                    "start": round(w.start, 6),
                    "end": round(w.end, 6),
                    "speaker": w.speaker or None,
                }
                for w in found.words
            ]

    async def _medium(self, media: media_pb2.Media, data: bytes, content_type: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if data:
            found["inline"] = digest(data)
        if media.media_id:
            query = media.url.partition("?")[2]
            request = DownloadMediaRequest(media_id=media.media_id, signature=query)
            got = [piece async for piece in self.media.DownloadMedia(request)]
            assert got[0].media.content_type == content_type
            found |= {"linked": digest(b"".join(p.chunk for p in got[1:])), "type": content_type}
        return found


def _ending(text: text_pb2.TextOutput | text_pb2.TextDelta) -> dict[str, Any]:
    usage = text.usage
    return {
        "finish": FINISH[text.finish_reason],
        "usage": [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens],
    }


def _failed(outcome: Outcome, error: grpc.aio.AioRpcError) -> None:
    outcome.message = error.details() or ""
    outcome.status = error.code().name
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        outcome.code = "deadline_exceeded"  # by the client's own clock or by the server's: the same to a user
        return
    status = status_pb2.Status()
    trailing = dict(error.trailing_metadata() or ())
    status.ParseFromString(trailing["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "pomelo"
    assert status.message == outcome.message
    assert status.code == error.code().value[0]
    outcome.code = info.reason.lower()
    retry = error_details_pb2.RetryInfo()
    if any(detail.Unpack(retry) for detail in status.details):
        outcome.retry_after = retry.retry_delay.seconds


# --- REST


class Rest:
    """An HTTP client before a base URL."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self.session = session
        self.base = base

    def headers(self, ask: Ask) -> dict[str, str]:
        """What a call bears."""
        headers = {"Authorization": f"Bearer {ask.key}"} if ask.key else {}
        if ask.request_id:
            headers["X-Request-Id"] = ask.request_id
        if ask.timeout:
            headers["X-Request-Timeout"] = str(ask.timeout)
        return headers

    async def __call__(self, ask: Ask) -> Outcome:
        """Asks, and waits for the end."""
        body = ask.body | ({"stream": True} if ask.stream else {})
        outcome = Outcome()
        async with self.session.post(
            f"{self.base}/api/v1/task", json=body, headers=self.headers(ask)
        ) as answer:
            outcome.status = str(answer.status)
            outcome.headers = {k.lower(): v for k, v in answer.headers.items()}
            if "Retry-After" in answer.headers:
                outcome.retry_after = int(answer.headers["Retry-After"])
            if answer.content_type == "text/event-stream":
                assert answer.status == 200
                await self._stream(await answer.text(), outcome, kind_of(ask.body.get("model")))
            else:
                found = await answer.json()
                if answer.status == 200:
                    assert not ask.stream
                    await self._result(found, outcome)
                else:
                    _refused(found, outcome)
        return outcome

    async def _stream(self, text: str, outcome: Outcome, kind: str) -> None:
        sound, ended, common = [], False, None
        for block in text.split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if not lines:
                continue
            assert not ended, "something after [DONE]"
            if lines[0] == "event: error":
                _refused(json.loads(lines[1].removeprefix("data: ")), outcome)
                continue
            assert outcome.code == "ok", "something after an error"
            (line,) = lines
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                ended = True
                continue
            chunk = json.loads(data)
            assert chunk["id"].startswith(PREFIX.get(kind, "speech_"))
            assert common in (None, [chunk["id"], chunk["created"], chunk["model"]])
            common = [chunk["id"], chunk["created"], chunk["model"]]
            name = chunk["object"]
            if name == "task.completion.chunk":
                (choice,) = chunk["choices"]
                piece = choice["delta"].get("content", "")
                outcome.pieces += bool(piece)
                outcome.output["text"] = outcome.output.get("text", "") + piece
                if choice["finish_reason"]:
                    outcome.output |= {
                        "finish": choice["finish_reason"],
                        "usage": list(chunk["usage"].values()),
                    }
            elif name == "speech.generation.chunk":
                sound.append(base64.b64decode(chunk["audio"]["b64_json"]))
                outcome.output["sound"] = digest(b"".join(sound))
            elif name == "image.progress":
                outcome.output.setdefault("progress", []).append(chunk["progress"])
            else:
                await self._result(chunk, outcome)
        assert ended == (outcome.code == "ok"), "a stream is complete if and only if it ends with [DONE]"

    async def _result(self, found: dict[str, Any], outcome: Outcome) -> None:
        output = outcome.output
        output["model"] = found["model"]
        assert isinstance(found["created"], int)
        if found["object"] == "task.completion":
            assert set(found) == {"id", "object", "created", "model", "choices", "usage"}
            (choice,) = found["choices"]
            assert choice["index"] == 0
            assert choice["message"]["role"] == "assistant"
            output |= {"text": choice["message"]["content"], "finish": choice["finish_reason"]}
            output["usage"] = [found["usage"][f"{n}_tokens"] for n in ("prompt", "completion", "total")]
        elif found["object"] == "image.generation":
            assert set(found) == {"id", "object", "created", "model", "data"}
            (medium,) = found["data"]
            output |= await self._medium(medium)
        elif found["object"] == "speech.generation":
            assert set(found) == {"id", "object", "created", "model", "audio"}
            output |= await self._medium(found["audio"])
        else:
            assert found["object"] == "speech.transcription"
            output |= {"text": found["text"], "language": found["language"]}
            output["words"] = [
                word | {"start": round(word["start"], 6), "end": round(word["end"], 6)}
                for word in found["words"]
            ]

    async def _medium(self, medium: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "b64_json" in medium:
            found["inline"] = digest(base64.b64decode(medium["b64_json"]))
        if "url" in medium:
            assert medium["url"].startswith(self.base + "/media/"), "a link leads to the door that gave it"
            async with self.session.get(medium["url"]) as answer:
                assert answer.status == 200
                found |= {"linked": digest(await answer.read()), "type": answer.headers["Content-Type"]}
        return found


def _refused(found: dict[str, Any], outcome: Outcome) -> None:
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "code"}
    outcome.code = found["error"]["code"]
    outcome.message = found["error"]["message"]


def _timeless(message: str) -> str:
    return re.sub(r"Reset at \S+", "Reset at a time", message)


async def all_ways(wires: Mapping[str, Any], ask: Ask) -> dict[str, Outcome]:
    """Asks every wire the same, at once."""
    outcomes = await asyncio.gather(*[wire(ask) for wire in wires.values()])
    return dict(zip(wires, outcomes, strict=True))


def assert_same(outcomes: Mapping[str, Outcome], ask: Ask) -> None:
    """All ways gave the same output or error, and treated the request id the same."""
    first, *others = outcomes.items()
    for name, other in others:
        assert other.code == first[1].code, f"{name}: {other} but {first}"
        assert other.output == first[1].output, f"{name}: {other.output} but {first}"
        if other.code != "deadline_exceeded":
            assert _timeless(other.message) == _timeless(first[1].message), f"{name}: {other} but {first}"
            assert other.headers.get("x-pomelo-mode") == first[1].headers.get("x-pomelo-mode"), name
            if not ask.stream:  # a stream's error comes after the headers
                assert other.retry_after == first[1].retry_after, name
    for name, outcome in outcomes.items():
        if name == "grpc" and outcome.code == "deadline_exceeded":
            continue  # the client's own clock may end the call before anything came back
        given = outcome.headers["x-request-id"]
        assert given == ask.request_id if ask.request_id else given.startswith("req_"), name
