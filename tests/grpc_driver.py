"""A driver that runs a task over gRPC as a user would."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from pomelo.errors import TABLE
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
from tests.driver import Outcome, TaskRequest, add_call_piece, add_link, digest
from tests.tasks import to_options, to_task


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
                add_call_piece(outcome, piece.index, piece.id, piece.name, piece.arguments_json)
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
            add_link(outcome, media.url, data, output.content_type)


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
        # Only the client's own clock gives no details, and a proxy that has no server.
        without = outcome.message == TABLE["server_unavailable"].message
        assert without or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return
    status = status_pb2.Status.FromString(details)
    assert (status.code, status.message) == (error.code().value[0], outcome.message)
    outcome.code = reason_of(error)
    retry = error_details_pb2.RetryInfo()
    if any(detail.Unpack(retry) for detail in status.details):
        outcome.retry_after = retry.retry_delay.seconds


def _text_metadata(metadata: Any) -> dict[str, str]:
    return {name: value for name, value in as_dict(metadata).items() if not name.endswith("-bin")}
