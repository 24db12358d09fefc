"""`POST /v1/audio/speech`: runs a text-to-speech task in the form of OpenAI's API."""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic_core import to_json

from gateway import sse
from gateway.openai.parameters import Parameters, Values, is_among
from gateway.parsing.task import TaskRequest
from gateway.request import Request
from gateway.responses import Response
from gateway.state import Gateway
from gateway.task import send_raw
from gateway.types.base import Link
from gateway.types.fields import check_names, unknown_field
from gateway.types.speech import MAX_CHUNK_AUDIO
from pomelo.audio_formats import OUTPUT_FORMATS
from pomelo.call import Call
from pomelo.errors import invalid
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType

NO_EFFECT: Values = {"instructions": ()}


class SpeechParameters(Parameters):
    """The parameters of one request for speech."""

    task_type = TaskType.TASK_TYPE_TEXT_TO_SPEECH
    names: ClassVar[Mapping[str, str]] = {"text": "input", "output_format": "response_format"}

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._has_events = False
        self._has_speed = False

    def to_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        self.leave_out(body, NO_EFFECT)
        stream_format = body.pop("stream_format", None)
        if stream_format not in (None, "audio", "sse"):
            raise invalid("stream_format", "one of audio, sse")
        self._has_events = stream_format == "sse"
        stream = body.pop("stream", None)
        if stream is not None and stream is not False:
            raise unknown_field("stream")
        body["text"] = body.pop("input", None)
        voice = body.get("voice")
        if type(voice) is dict:
            check_names(voice, ("id",), "voice")
            body["voice"] = voice.get("id")
        if (response_format := body.pop("response_format", None)) is not None:
            body["output_format"] = _output_format(response_format)
        if (speed := body.pop("speed", None)) is not None:
            settings = body.get("voice_settings")
            if settings is None or type(settings) is dict:
                body["voice_settings"] = self._add_speed(settings or {}, speed)
        return body

    def _add_speed(self, settings: Mapping[str, Any], speed: Any) -> Mapping[str, Any]:
        """Returns voice settings with the speed. Raises as `to_fields`."""
        given = settings.get("speed")
        if given is not None and not is_among(given, (speed,)):
            raise invalid("speed", "left out, or the same as voice_settings.speed")
        self._has_speed = True
        return {**settings, "speed": speed}

    def caller_name(self, field: str) -> str:
        if field == "voice_settings.speed" and self._has_speed:
            return "speed"
        return super().caller_name(field)

    def complete(self, task: TaskRequest) -> None:
        super().complete(task)
        task.stream = self._has_events
        task.options.delivery = MediaDelivery.MEDIA_DELIVERY_INLINE

    async def run(self, gateway: Gateway, request: Request, call: Call, task: TaskRequest) -> Response | None:
        return await send_raw(gateway, request, call, task)

    def stream_format(self, link: Link) -> sse.StreamFormat:
        return sse.StreamFormat(
            lambda started: None, {"audio_chunk": _render_chunk}, _render_last, self.render_error
        )


def _output_format(response_format: Any) -> str:
    """Returns the output_format of a task, which may also be given itself, as it is more exact."""
    if type(response_format) is str:
        if (output_format := OUTPUT_FORMATS.get(response_format)) is not None:
            return output_format
        if "_" in response_format:
            return response_format
    raise invalid(
        "response_format",
        f"one of {', '.join(OUTPUT_FORMATS)}, or an output_format of Pomelo, such as mp3_44100_192",
    )


def _render_chunk(_: None, chunk: AudioChunk) -> Iterator[bytes]:
    data = chunk.data
    for at in range(0, len(data), MAX_CHUNK_AUDIO):
        audio = binascii.b2a_base64(data[at : at + MAX_CHUNK_AUDIO], newline=False)
        yield b'{"type":"speech.audio.delta","audio":"%b"}' % audio


# Speech has a price, but no tokens; SDKs require the counts.
_DONE = {"type": "speech.audio.done", "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}}


def _render_last(_: None, result: TaskResult) -> bytes:
    return sse.encode_event(to_json(_DONE)) + sse.DONE
