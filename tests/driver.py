"""Drivers that run a task over gRPC or REST as a user would, and read both protocols' answers into one Outcome."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from pomelo.gen.v1 import media_pb2
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import FinishReason
from tests.calls import as_dict, bearer, reason_of
from tests.tasks import to_options, to_task

PROTOCOLS = ("grpc", "rest", "remote")
"""gRPC, REST in the engine's process, and REST through a gateway that reaches the engine over gRPC."""

PROTOCOL = pytest.mark.parametrize("protocol", PROTOCOLS)
REST_PROTOCOL = pytest.mark.parametrize("protocol", PROTOCOLS[1:])
METHOD = pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
PROTOCOL_AND_STREAM = pytest.mark.parametrize(
    ("protocol", "stream"), [(protocol, stream) for protocol in PROTOCOLS for stream in (False, True)]
)


@dataclass
class TaskRequest:
    """A task, independent of the protocol. `body` is the REST body without `stream`; `timeout` is in seconds;
    `form` sends REST's body as a multipart form."""

    body: Mapping[str, Any]
    key: str | None
    stream: bool = False
    request_id: str | None = None
    timeout: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    form: bool = False


@dataclass
class Outcome:
    """The result of a task, or its error. Names of headers are in lower case."""

    code: str = "ok"
    message: str = ""
    status: int = 200
    """REST's status."""
    grpc_status: str = "OK"
    retry_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    id: str = ""
    output: dict[str, Any] = field(default_factory=dict)
    """The output, equal for all protocols; digests stand for bytes."""
    done: bool = False
    """Whether it was a stream that was complete."""
    links: tuple[str, ...] = ()
    adjustments: tuple[str, ...] = ()
    """The adjustments of a gRPC message, in the form of REST's header."""

    @property
    def metadata(self) -> dict[str, str]:
        """The headers and the trailers."""
        return self.headers | self.trailers

    @property
    def content(self) -> str:
        """The text, or the digest of the media; empty without output."""
        return next((self.output[n] for n in ("audio", "linked", "inline", "text") if n in self.output), "")

    @property
    def usage(self) -> tuple[int, ...]:
        """The prompt, completion and total tokens; empty if none were reported."""
        return tuple(self.output.get("usage", ()))


class GrpcDriver:
    """Runs tasks over a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._tasks = TaskServiceStub(channel)
        self._media = MediaServiceStub(channel)
        self._models = ModelServiceStub(channel)

    async def __call__(self, request: TaskRequest) -> Outcome:
        """Runs a task to its end."""
        spec, task_options = to_task(request.body), to_options(request.body, stream=request.stream)
        outcome = Outcome()
        metadata = [("authorization", f"Bearer {request.key}")] if request.key else []
        metadata += [("x-request-id", request.request_id)] if request.request_id else []
        metadata += [(name.lower(), value) for name, value in request.headers.items()]
        options: dict[str, Any] = {"metadata": metadata, "timeout": request.timeout}
        try:
            if request.stream:
                call = self._tasks.StreamTask(StreamTaskRequest(spec=spec, options=task_options), **options)
                await self._read_stream(call, outcome)
            else:
                call = self._tasks.RunTask(RunTaskRequest(spec=spec, options=task_options), **options)
                await self._read_result((await call).result, outcome)
        except grpc.aio.AioRpcError as error:
            _read_rpc_error(error, outcome)
        outcome.trailers = _text_metadata(await call.trailing_metadata())
        # An accepted stream sends its headers as initial metadata; other calls as trailing metadata.
        initial = _text_metadata(await call.initial_metadata())
        outcome.headers = initial if "x-request-id" in initial else outcome.trailers
        return outcome

    async def list_models(self, key: str) -> Outcome:
        """Lists the models; the outcome has no output."""
        call = self._models.ListModels(ListModelsRequest(), metadata=bearer(key))
        await call
        return Outcome(headers=_text_metadata(await call.trailing_metadata()))

    async def _read_stream(self, call: Any, outcome: Outcome) -> None:
        text, audio, started, number = [], [], None, 0
        async for message in call:
            assert not outcome.done, "an event after `completed`"
            event, number = message.event, number + 1
            assert event.sequence_number == number
            which = event.WhichOneof("event")
            if started is None:
                assert which == "started", which
                started = event.started
                outcome.id, outcome.adjustments = started.id, _adjustments(started)
            elif which == "text_delta":
                text.append(event.text_delta.text)
                outcome.output["text"] = "".join(text)
            elif which == "tool_call_delta":
                piece = event.tool_call_delta
                _add_call_piece(outcome, piece.index, piece.id, piece.name, piece.arguments_json)
            elif which == "audio_chunk":
                audio.append(event.audio_chunk.data)
                outcome.output["audio"] = digest(b"".join(audio))
            elif which == "image_progress":
                outcome.output.setdefault("progress", []).append(event.image_progress.progress)
            else:
                result = event.completed
                assert (result.id, result.create_time, result.model) == (
                    started.id,
                    started.create_time,
                    started.model,
                )
                assert not result.speech.data
                assert not result.text.HasField("message")
                if result.HasField("text"):
                    assert started.id.startswith("task_")
                    outcome.output |= {"text": "".join(text)} | _text_end(result)
                else:
                    await self._read_result(result, outcome)
                outcome.done = True

    async def _read_result(self, result: TaskResult, outcome: Outcome) -> None:
        output = outcome.output
        outcome.id, outcome.adjustments = result.id, _adjustments(result)
        output["model"] = result.model
        match result.WhichOneof("output"):
            case "text":
                assert result.id.startswith("task_")
                parts = result.text.message.content
                output |= {"text": "".join(part.text for part in parts)} | _text_end(result)
                calls = [part.tool_call for part in parts if part.HasField("tool_call")]
                if calls:
                    output["calls"] = [[call.id, call.name, call.arguments_json] for call in calls]
            case "image":
                assert result.id.startswith("img_")
                (image,) = result.image.images
                await self._read_media(image, outcome)
            case "speech":
                assert result.id.startswith("speech_")
                await self._read_media(result.speech, outcome)
            case _:
                assert result.id.startswith("speech_")
                transcription = result.transcription
                output |= {"text": transcription.text, "language": transcription.language_code}
                output["words"] = [
                    {
                        "text": word.text,
                        "start": round(word.start_offset.ToNanoseconds() / 10**9, 6),
                        "end": round(word.end_offset.ToNanoseconds() / 10**9, 6),
                        "speaker": word.speaker or None,
                    }
                    for word in transcription.words
                ]

    async def _read_media(self, output: Any, outcome: Outcome) -> None:
        media: media_pb2.Media = output.media
        if output.data:
            outcome.output["inline"] = digest(output.data)
        if media.id:
            signature = media.url.partition("?")[2]
            request = DownloadMediaRequest(id=media.id, signature=signature)
            head, *rest = [message async for message in self._media.DownloadMedia(request)]
            assert head.media.content_type == output.content_type
            data = b"".join(message.chunk for message in rest)
            _add_link(outcome, media.url, data, output.content_type)


class RestDriver:
    """Runs tasks at the base URL of a gateway, which has no slash at its end."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self.session = session
        self.base = base

    async def __call__(self, request: TaskRequest) -> Outcome:
        """Runs a task to its end."""
        body = {**request.body, "stream": True} if request.stream else dict(request.body)
        headers = {"Authorization": f"Bearer {request.key}"} if request.key else {}
        if request.request_id:
            headers["X-Request-Id"] = request.request_id
        if request.timeout is not None:
            headers["X-Request-Timeout"] = str(request.timeout)
        sent: dict[str, Any] = {"data": _form(body)} if request.form else {"json": body}
        url = f"{self.base}/api/v1/task"
        async with self.session.post(url, headers=headers | dict(request.headers), **sent) as answer:
            outcome = _rest_outcome(answer)
            if answer.content_type == "text/event-stream":
                assert answer.status == 200
                await self._read_stream(await answer.text(), outcome)
            elif answer.content_type != "application/json":
                outcome.output["inline"] = digest(await answer.read())
            elif answer.status == 200:
                await self._read_result(await answer.json(), outcome)
            else:
                _read_rest_error(await answer.json(), outcome)
        return outcome

    async def get(self, path: str, key: str, **headers: str) -> Outcome:
        """Gets a path; the outcome has no output."""
        headers["Authorization"] = f"Bearer {key}"
        async with self.session.get(self.base + path, headers=headers) as answer:
            outcome = _rest_outcome(answer)
            if answer.content_type == "application/json" and answer.status >= 400:
                _read_rest_error(await answer.json(), outcome)
        return outcome

    async def _read_stream(self, text: str, outcome: Outcome) -> None:
        audio, common = [], None
        for block in text.split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if not lines:
                continue
            assert not outcome.done, "an event after [DONE]"
            if lines[0] == "event: error":
                _read_rest_error(json.loads(lines[1].removeprefix("data: ")), outcome)
                continue
            assert outcome.code == "ok", "an event after an error"
            (line,) = lines
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                outcome.done = True
                continue
            chunk = json.loads(data)
            assert common in (None, [chunk["id"], chunk["created"], chunk["model"]])
            common = [chunk["id"], chunk["created"], chunk["model"]]
            outcome.id, name = chunk["id"], chunk["object"]
            assert outcome.id.startswith(
                {"task": "task_", "image": "img_"}.get(name.split(".")[0], "speech_")
            )
            if name == "task.completion.chunk":
                (choice,) = chunk["choices"]
                delta = choice["delta"]
                if "content" in delta or choice["finish_reason"]:
                    outcome.output["text"] = outcome.output.get("text", "") + delta.get("content", "")
                for call in delta.get("tool_calls", []):
                    function = call["function"]
                    assert call.get("type", "function") == "function"
                    first = call.get("id", ""), function.get("name", "")
                    _add_call_piece(outcome, call["index"], *first, function["arguments"])
                if choice["finish_reason"]:
                    outcome.output["finish"] = choice["finish_reason"]
                    outcome.output["usage"] = _token_counts(chunk["usage"])
            elif name == "speech.generation.chunk":
                audio.append(base64.b64decode(chunk["audio"]["b64_json"]))
                outcome.output["audio"] = digest(b"".join(audio))
            elif name == "image.progress":
                outcome.output.setdefault("progress", []).append(chunk["progress"])
            else:
                await self._read_result(chunk, outcome)
        assert outcome.done == (outcome.code == "ok"), (
            "a stream ends with [DONE] if and only if it is complete"
        )

    async def _read_result(self, result: dict[str, Any], outcome: Outcome) -> None:
        output = outcome.output
        outcome.id, output["model"] = result["id"], result["model"]
        assert isinstance(result["created"], int)
        match result["object"]:
            case "task.completion":
                assert set(result) == {"id", "object", "created", "model", "choices", "usage"}
                (choice,) = result["choices"]
                assert choice["index"] == 0
                assert choice["message"]["role"] == "assistant"
                output |= {"text": choice["message"]["content"] or "", "finish": choice["finish_reason"]}
                output["usage"] = _token_counts(result["usage"])
                if "tool_calls" in choice["message"]:
                    output["calls"] = [
                        [call["id"], call["function"]["name"], call["function"]["arguments"]]
                        for call in choice["message"]["tool_calls"]
                    ]
            case "image.generation":
                assert set(result) == {"id", "object", "created", "model", "data"}
                (media,) = result["data"]
                await self._read_media(media, outcome)
            case "speech.generation":
                assert set(result) == {"id", "object", "created", "model", "audio"}
                await self._read_media(result["audio"], outcome)
            case name:
                assert name == "speech.transcription"
                output |= {"text": result["text"], "language": result["language"]}
                output["words"] = [
                    word | {"start": round(word["start"], 6), "end": round(word["end"], 6)}
                    for word in result["words"]
                ]

    async def _read_media(self, media: dict[str, Any], outcome: Outcome) -> None:
        if "b64_json" in media:
            outcome.output["inline"] = digest(base64.b64decode(media["b64_json"]))
        if "url" in media:
            assert media["url"].startswith(self.base + "/media/"), (
                "a link leads to the gateway that returned it"
            )
            async with self.session.get(media["url"]) as answer:
                data = await answer.read()
                assert answer.status == 200, data
                _add_link(outcome, media["url"], data, answer.headers["Content-Type"])


def _add_call_piece(outcome: Outcome, index: int, call_id: str, name: str, arguments: str) -> None:
    """Adds a piece of a tool call to the output, which has its id, name and arguments."""
    calls = outcome.output.setdefault("calls", [])
    if index == len(calls):
        assert call_id
        assert name
        calls.append([call_id, name, ""])
    else:
        assert not call_id
        assert not name
    calls[index][2] += arguments


def _token_counts(usage: Mapping[str, Any]) -> list[int]:
    return [usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")]


def digest(data: bytes) -> str:
    """Returns the length of the data and a part of its SHA-256; empty for no data."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}" if data else ""


def _add_link(outcome: Outcome, url: str, data: bytes, content_type: str) -> None:
    outcome.links = (url,)
    outcome.output |= {"linked": digest(data), "type": content_type}
    assert outcome.output.get("inline", digest(data)) == digest(data), (
        "the link and the bytes are the same media"
    )


def _adjustments(message: Any) -> tuple[str, ...]:
    return tuple(
        f"{one.field}={one.used}" if one.kind == one.KIND_CLAMPED else one.field
        for one in message.adjustments
    )


def _text_end(result: TaskResult) -> dict[str, Any]:
    used, generated = result.usage.input_tokens, result.usage.output_tokens
    return {
        "finish": FinishReason.Name(result.text.finish_reason).removeprefix("FINISH_REASON_").lower(),
        "usage": [used, generated, used + generated],
    }


def _read_rpc_error(error: grpc.aio.AioRpcError, outcome: Outcome) -> None:
    outcome.message, outcome.grpc_status = error.details() or "", error.code().name
    outcome.code = error.code().name.lower()
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if details is None:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, (
            "only the client's own clock gives no details"
        )
        return
    status = status_pb2.Status.FromString(details)
    assert (status.code, status.message) == (error.code().value[0], outcome.message)
    outcome.code = reason_of(error)
    retry = error_details_pb2.RetryInfo()
    if any(detail.Unpack(retry) for detail in status.details):
        outcome.retry_after = retry.retry_delay.seconds


def _rest_outcome(answer: aiohttp.ClientResponse) -> Outcome:
    outcome = Outcome(status=answer.status, headers={k.lower(): v for k, v in answer.headers.items()})
    if "retry-after" in outcome.headers:
        outcome.retry_after = int(outcome.headers["retry-after"])
    return outcome


def _read_rest_error(body: dict[str, Any], outcome: Outcome) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code"}
    outcome.code, outcome.message = body["error"]["code"], body["error"]["message"]


def _form(body: Mapping[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in body.items():
        if name == "audio":
            form.add_field(name, base64.b64decode(value), filename="a.bin", content_type="audio/mpeg")
        else:
            form.add_field(name, value if isinstance(value, str) else json.dumps(value))
    return form


def _text_metadata(metadata: Any) -> dict[str, str]:
    return {name: value for name, value in as_dict(metadata).items() if not name.endswith("-bin")}
