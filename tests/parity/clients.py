"""Clients of gRPC and REST that return outcomes in one common form, so that they can be compared."""

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

TASK_TYPES = {
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
    """One request, independent of the protocol. `body` is the JSON of REST without `stream`."""

    body: dict[str, Any]
    key: str | None
    stream: bool = False
    request_id: str | None = None
    timeout: float | None = None


@dataclass
class Outcome:
    """The result of a request without what always differs (ids, times, hosts)."""

    code: str = "ok"
    message: str = ""
    output: dict[str, Any] = field(default_factory=dict)
    pieces: int = 0
    status: str = "OK"
    """The HTTP status, or the name of the gRPC status."""
    retry_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


def task_type_of(model: object) -> str:
    """Returns the task type of a model by its name; text for an unknown name."""
    return next(
        (task_type for start, task_type in TASK_TYPES.items() if str(model).startswith(start)), "text"
    )


def digest(data: bytes) -> str:
    """Returns a short name for bytes."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}"


# --- gRPC


def to_task(body: Mapping[str, Any], *, stream: bool = False) -> Task:
    """Returns the message that equals a REST body; independent of the gateway's code."""
    task_type = task_type_of(body.get("model"))
    task = Task(model=body.get("model", ""))
    rest = {k: v for k, v in body.items() if k != "model"}
    if task_type == "text":
        text = task.text
        text.SetInParent()
        for message in rest.pop("messages", []):
            item = text.messages.add()
            if "role" in message:
                item.role = text_pb2.Role.Value(f"ROLE_{message['role'].upper()}")
            content = message.get("content")
            if isinstance(content, str):
                item.content = content
            elif content is not None:
                item.parts.SetInParent()
                for part in content:
                    if part["type"] == "text":
                        item.parts.parts.add(text=part["text"])
                    else:
                        item.parts.parts.add(image_url=text_pb2.ImageUrl(url=part["image_url"]["url"]))
        stop = rest.pop("stop", [])
        text.stop.extend([stop] if isinstance(stop, str) else stop)
        _set(text, rest)
    else:
        input_message = getattr(task, task_type)
        input_message.SetInParent()
        audio = rest.pop("audio", None)
        if audio is not None and task_type != "text_to_speech":
            input_message.audio.data = base64.b64decode(audio)
        timestamps = rest.pop("timestamps", None)
        if timestamps is not None:
            input_message.timestamps = speech_pb2.Timestamps.Value(f"TIMESTAMPS_{timestamps.upper()}")
        response_format = rest.pop("response_format", "unspecified" if stream else "both")
        if task_type != "speech_to_text":
            input_message.response_format = media_pb2.ResponseFormat.Value(
                f"RESPONSE_FORMAT_{response_format.upper()}"
            )
        if task_type == "image" and "output_format" in rest:
            image_format = rest.pop("output_format").upper()
            input_message.output_format = image_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{image_format}")
        for name, value in rest.pop("voice_settings", {}).items():
            setattr(input_message.voice_settings, name, value)
        _set(input_message, rest)
    return task


def _set(message: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in message.DESCRIPTOR.fields_by_name:
            setattr(message, name, value)


class Grpc:
    """A client with the generated stubs."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.tasks = TaskServiceStub(channel)
        self.media = MediaServiceStub(channel)

    def metadata(self, ask: Ask) -> list[tuple[str, str]]:
        """Returns the headers of a request."""
        pairs = [("authorization", f"Bearer {ask.key}")] if ask.key else []
        return pairs + ([("x-request-id", ask.request_id)] if ask.request_id else [])

    async def __call__(self, ask: Ask) -> Outcome:
        """Sends the request and waits for its outcome."""
        task = to_task(ask.body, stream=ask.stream)
        outcome = Outcome()
        options: dict[str, Any] = {"metadata": self.metadata(ask), "timeout": ask.timeout}
        if ask.stream:
            call = self.tasks.StreamTask(StreamTaskRequest(task=task), **options)
            try:
                await self._stream(call, outcome)
            except grpc.aio.AioRpcError as error:
                _set_error(outcome, error)
        else:
            call = self.tasks.RunTask(RunTaskRequest(task=task), **options)
            try:
                await self._result((await call).result, outcome, complete=True)
            except grpc.aio.AioRpcError as error:
                _set_error(outcome, error)
        # An accepted stream sends its headers as initial metadata; other calls as trailing metadata.
        metadata = await call.initial_metadata()
        if "x-request-id" not in metadata:
            metadata = await call.trailing_metadata()
        outcome.headers = {str(k): str(v) for k, v in metadata or ()}
        return outcome

    async def _stream(self, call: Any, outcome: Outcome) -> None:
        text, audio, started = [], [], None
        async for event in call:
            event_type = event.WhichOneof("event")
            if started is None:
                assert event_type == "started", event_type
                started = event.started
                continue
            if event_type == "text_delta":
                outcome.pieces += bool(event.text_delta.content)
                text.append(event.text_delta.content)
                outcome.output["text"] = "".join(text)
                if event.text_delta.finish_reason:
                    outcome.output |= _finish(event.text_delta)
                    assert started.id.startswith("task_")
            elif event_type == "audio_chunk":
                audio.append(event.audio_chunk.data)
                outcome.output["sound"] = digest(b"".join(audio))
            elif event_type == "image_progress":
                outcome.output.setdefault("progress", []).append(event.image_progress.progress)
            else:
                assert event.result.id == started.id
                assert event.result.model == started.model
                await self._result(event.result, outcome, complete=False)

    async def _result(self, result: TaskResult, outcome: Outcome, *, complete: bool) -> None:
        output = outcome.output
        output["model"] = result.model
        output_type = result.WhichOneof("output")
        if output_type == "text":
            assert result.id.startswith("task_")
            output |= {"text": result.text.content} | _finish(result.text)
        elif output_type == "image":
            assert result.id.startswith("img_")
            (image,) = result.image.images
            output |= await self._media(image.media, image.data, image.content_type)
        elif output_type == "speech":
            assert result.id.startswith("speech_")
            assert complete or not result.speech.data
            output |= await self._media(result.speech.media, result.speech.data, result.speech.content_type)
        else:
            assert result.id.startswith("speech_")
            transcription = result.transcription
            output |= {"text": transcription.text, "language": transcription.language}
            output["words"] = [
                {
                    "text": w.text,
                    "start": round(w.start, 6),
                    "end": round(w.end, 6),
                    "speaker": w.speaker or None,
                }
                for w in transcription.words
            ]

    async def _media(self, media: media_pb2.Media, data: bytes, content_type: str) -> dict[str, Any]:
        digests: dict[str, Any] = {}
        if data:
            digests["inline"] = digest(data)
        if media.media_id:
            query = media.url.partition("?")[2]
            request = DownloadMediaRequest(media_id=media.media_id, signature=query)
            messages = [piece async for piece in self.media.DownloadMedia(request)]
            assert messages[0].media.content_type == content_type
            digests |= {"linked": digest(b"".join(p.chunk for p in messages[1:])), "type": content_type}
        return digests


def _finish(text: text_pb2.TextOutput | text_pb2.TextDelta) -> dict[str, Any]:
    usage = text.usage
    return {
        "finish": FINISH[text.finish_reason],
        "usage": [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens],
    }


def _set_error(outcome: Outcome, error: grpc.aio.AioRpcError) -> None:
    outcome.message = error.details() or ""
    outcome.status = error.code().name
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        outcome.code = "deadline_exceeded"  # decided by the client or the server: the same to a user
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
    """An HTTP client of a gateway."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self.session = session
        self.base = base

    def headers(self, ask: Ask) -> dict[str, str]:
        """Returns the headers of a request."""
        headers = {"Authorization": f"Bearer {ask.key}"} if ask.key else {}
        if ask.request_id:
            headers["X-Request-Id"] = ask.request_id
        if ask.timeout:
            headers["X-Request-Timeout"] = str(ask.timeout)
        return headers

    async def __call__(self, ask: Ask) -> Outcome:
        """Sends the request and waits for its outcome."""
        body = ask.body | ({"stream": True} if ask.stream else {})
        outcome = Outcome()
        async with self.session.post(
            f"{self.base}/api/v1/task", json=body, headers=self.headers(ask)
        ) as response:
            outcome.status = str(response.status)
            outcome.headers = {k.lower(): v for k, v in response.headers.items()}
            if "Retry-After" in response.headers:
                outcome.retry_after = int(response.headers["Retry-After"])
            if response.content_type == "text/event-stream":
                assert response.status == 200
                await self._stream(await response.text(), outcome, task_type_of(ask.body.get("model")))
            else:
                parsed = await response.json()
                if response.status == 200:
                    assert not ask.stream
                    await self._result(parsed, outcome)
                else:
                    _set_error_body(parsed, outcome)
        return outcome

    async def _stream(self, text: str, outcome: Outcome, task_type: str) -> None:
        audio, ended, common = [], False, None
        for block in text.split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if not lines:
                continue
            assert not ended, "data after [DONE]"
            if lines[0] == "event: error":
                _set_error_body(json.loads(lines[1].removeprefix("data: ")), outcome)
                continue
            assert outcome.code == "ok", "data after an error"
            (line,) = lines
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                ended = True
                continue
            chunk = json.loads(data)
            assert chunk["id"].startswith(PREFIX.get(task_type, "speech_"))
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
                audio.append(base64.b64decode(chunk["audio"]["b64_json"]))
                outcome.output["sound"] = digest(b"".join(audio))
            elif name == "image.progress":
                outcome.output.setdefault("progress", []).append(chunk["progress"])
            else:
                await self._result(chunk, outcome)
        assert ended == (outcome.code == "ok"), "a stream is complete if and only if it ends with [DONE]"

    async def _result(self, body: dict[str, Any], outcome: Outcome) -> None:
        output = outcome.output
        output["model"] = body["model"]
        assert isinstance(body["created"], int)
        if body["object"] == "task.completion":
            assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
            (choice,) = body["choices"]
            assert choice["index"] == 0
            assert choice["message"]["role"] == "assistant"
            output |= {"text": choice["message"]["content"], "finish": choice["finish_reason"]}
            output["usage"] = [body["usage"][f"{n}_tokens"] for n in ("prompt", "completion", "total")]
        elif body["object"] == "image.generation":
            assert set(body) == {"id", "object", "created", "model", "data"}
            (file,) = body["data"]
            output |= await self._media(file)
        elif body["object"] == "speech.generation":
            assert set(body) == {"id", "object", "created", "model", "audio"}
            output |= await self._media(body["audio"])
        else:
            assert body["object"] == "speech.transcription"
            output |= {"text": body["text"], "language": body["language"]}
            output["words"] = [
                word | {"start": round(word["start"], 6), "end": round(word["end"], 6)}
                for word in body["words"]
            ]

    async def _media(self, file: dict[str, Any]) -> dict[str, Any]:
        digests: dict[str, Any] = {}
        if "b64_json" in file:
            digests["inline"] = digest(base64.b64decode(file["b64_json"]))
        if "url" in file:
            assert file["url"].startswith(self.base + "/media/"), (
                "a link leads to the gateway that returned it"
            )
            async with self.session.get(file["url"]) as response:
                assert response.status == 200
                digests |= {"linked": digest(await response.read()), "type": response.headers["Content-Type"]}
        return digests


def _set_error_body(body: dict[str, Any], outcome: Outcome) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code"}
    outcome.code = body["error"]["code"]
    outcome.message = body["error"]["message"]


def _without_time(message: str) -> str:
    return re.sub(r"Reset at \S+", "Reset at a time", message)


async def ask_all(clients: Mapping[str, Any], ask: Ask) -> dict[str, Outcome]:
    """Sends the same request with all clients concurrently."""
    outcomes = await asyncio.gather(*[client(ask) for client in clients.values()])
    return dict(zip(clients, outcomes, strict=True))


def assert_same(outcomes: Mapping[str, Outcome], ask: Ask) -> None:
    """Checks that all outcomes have the same output or error, and handle the request id equally."""
    first, *others = outcomes.items()
    for name, other in others:
        assert other.code == first[1].code, f"{name}: {other} but {first}"
        assert other.output == first[1].output, f"{name}: {other.output} but {first}"
        if other.code != "deadline_exceeded":
            assert _without_time(other.message) == _without_time(first[1].message), (
                f"{name}: {other} but {first}"
            )
            assert other.headers.get("x-pomelo-mode") == first[1].headers.get("x-pomelo-mode"), name
            if not ask.stream:  # a stream's error comes after the headers
                assert other.retry_after == first[1].retry_after, name
    for name, outcome in outcomes.items():
        if name == "grpc" and outcome.code == "deadline_exceeded":
            continue  # the client may end the call before it receives anything
        request_id = outcome.headers["x-request-id"]
        assert request_id == ask.request_id if ask.request_id else request_id.startswith("req_"), name
