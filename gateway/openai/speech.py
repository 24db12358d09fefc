"""`POST /v1/audio/speech`: runs a text-to-speech task in the form of OpenAI's API."""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import to_json

from gateway import sse
from gateway.errors import error_body
from gateway.openai.parameters import SPEECH, Parameters
from gateway.parsing.task import Translation, read_task
from gateway.request import Request
from gateway.responses import Response
from gateway.state import Gateway
from gateway.task import send_raw
from gateway.types.fields import unknown_field
from gateway.types.speech import MAX_CHUNK_AUDIO
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.service import Visit

_OUTPUT_FORMATS = {
    "mp3": "mp3_44100_128",
    "opus": "opus_48000_64",
    "wav": "wav_24000",
    "pcm": "pcm_24000",
}
"""The output_format of a task for each response_format that Pomelo has; raw samples are those of OpenAI."""

_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {"instructions": ()}


async def create_speech(gateway: Gateway, request: Request, call: Call, visit: Visit) -> Response | None:
    """Runs a text-to-speech task, and sends its audio as it arrives: raw, or as server-sent events.

    Raises:
        PomeloError: any error of the table, also after the first byte.
    """
    parameters = _SpeechParameters(call)
    translation = Translation(TaskType.TASK_TYPE_TEXT_TO_SPEECH, parameters.to_fields)
    parsed = await read_task(gateway, request, call, visit, translation)
    tasks = gateway.services.tasks
    try:
        if not parameters.has_events:
            return await send_raw(request, call, tasks, parsed)
        parsed.options.delivery = MediaDelivery.MEDIA_DELIVERY_INLINE
        await sse.stream_task(
            request,
            call,
            tasks,
            parsed.spec,
            parsed.options,
            _STREAM,
            keep_alive=gateway.options.keep_alive,
        )
        return None
    except PomeloError as error:
        raise await visit.refuse_task(error) from None


class _SpeechParameters(Parameters):
    """The parameters of one request. `has_events` is whether it asks for server-sent events."""

    def __init__(self, call: Call) -> None:
        super().__init__(call, SPEECH)
        self.has_events = False

    def to_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        self.check_names(body)
        self.leave_out(body, _NO_EFFECT)
        stream_format = body.pop("stream_format", None)
        if stream_format not in (None, "audio", "sse"):
            raise invalid("stream_format", "one of audio, sse")
        self.has_events = stream_format == "sse"
        stream = body.pop("stream", None)
        if stream is not None and stream is not False:
            raise unknown_field("stream")
        body["text"] = body.pop("input", None)
        voice = body.get("voice")
        if type(voice) is dict:
            body["voice"] = voice.get("id")
        if (response_format := body.pop("response_format", None)) is not None:
            body["output_format"] = _output_format(response_format)
        if (speed := body.pop("speed", None)) is not None:
            settings = body.get("voice_settings")
            if settings is None or type(settings) is dict:
                body["voice_settings"] = {**(settings or {}), "speed": speed}
        return body


def _output_format(response_format: Any) -> str:
    """Returns the output_format of a task, which may also be given itself, as it is more exact."""
    if type(response_format) is str:
        if (output_format := _OUTPUT_FORMATS.get(response_format)) is not None:
            return output_format
        if "_" in response_format:
            return response_format
    raise invalid(
        "response_format",
        f"one of {', '.join(_OUTPUT_FORMATS)}, or an output_format of Pomelo, such as mp3_44100_192",
    )


def _render_chunk(_: None, chunk: AudioChunk) -> Iterator[bytes]:
    data = chunk.data
    for at in range(0, len(data), MAX_CHUNK_AUDIO):
        audio = binascii.b2a_base64(data[at : at + MAX_CHUNK_AUDIO], newline=False)
        yield b'{"type":"speech.audio.delta","audio":"%b"}' % audio


# Speech has a price, but no tokens; SDKs require the counts.
_DONE = {"type": "speech.audio.done", "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}}

_STREAM = sse.StreamFormat(
    lambda started: None,
    {"audio_chunk": _render_chunk},
    lambda _, result: sse.encode_event(to_json(_DONE)) + sse.DONE,
    lambda _, error, request: sse.encode_event(error_body(error, request)),
)
