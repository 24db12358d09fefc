"""`POST /v1/audio/transcriptions`: runs a speech-to-text task in the form of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic_core import to_json

from gateway import sse
from gateway.openai.captions import to_srt, to_vtt
from gateway.openai.parameters import Parameters, Values
from gateway.openai.segments import join, sentences
from gateway.parsing.multipart import FormFields
from gateway.parsing.task import TaskRequest
from gateway.request import Request
from gateway.responses import Response, response_headers
from gateway.state import Gateway
from gateway.types.base import Link
from gateway.types.fields import parse_flag_text
from pomelo.call import Call
from pomelo.errors import invalid
from pomelo.gen.v1.speech_pb2 import Transcription
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType
from pomelo.protobuf.times import from_duration

GRANULARITIES = ("timestamp_granularities[]", "timestamp_granularities")
"""The names of a list in a form: as the SDKs write it, and as the documentation does."""

GRANULARITY_NAMES = frozenset({"word", "segment"})

NO_EFFECT: Values = {
    "temperature": ("0", "0.0"),
    "prompt": (),
    "chunking_strategy": ("auto",),
}

_NAMES = {
    "audio": "file",
    "language_code": "language",
    "timestamps": "timestamp_granularities",
}

_THREAD_CHARACTERS = 16 * 1024
"""Characters from which a transcript is rendered in a thread, as that takes some 10 ms."""


class TranscriptionParameters(Parameters):
    """The parameters of one request for a transcript. `format` is the response format; `granularities` are
    what verbose JSON has times of: words, segments or both."""

    task_type = TaskType.TASK_TYPE_SPEECH_TO_TEXT
    names: ClassVar[Mapping[str, str]] = _NAMES
    form_fields = FormFields(
        {
            *("model", "file", "language", "response_format", *GRANULARITIES, "stream"),
            *("diarize", "num_speakers"),
            *NO_EFFECT,
        },
        lists=GRANULARITIES,
        split=NO_EFFECT,
        file="file",
        renamed=_NAMES,
    )

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.format = FORMATS["json"]
        self.granularities: Collection[str] = ("segment",)

    def to_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.pop("file", None) is not None:
            raise invalid("file", "a file, with a file name")
        # SDKs split an object into parts; all of them together are one parameter.
        for part in [name for name in body if "[" in name and name not in GRANULARITIES]:
            body[part.partition("[")[0]] = {part: body.pop(part)}
        self.leave_out(body, NO_EFFECT)
        name = body.pop("response_format", "json")
        response_format = FORMATS.get(name)
        if response_format is None:
            raise invalid("response_format", f"one of {', '.join(FORMATS)}")
        self.format = response_format
        if name not in ("json", "text") and parse_flag_text(body.get("stream", "null")) not in (None, False):
            raise invalid("response_format", "json or text with stream")
        granularities = [each for name in GRANULARITIES for each in body.pop(name, ())]
        if granularities:
            if not GRANULARITY_NAMES.issuperset(granularities):
                raise invalid("timestamp_granularities", "word, segment or both")
            if name != "verbose_json":
                raise invalid("timestamp_granularities", "left out unless response_format is verbose_json")
            self.granularities = granularities
        if language := body.pop("language", ""):  # empty: to be detected
            body["language_code"] = language
        if name == "diarized_json":
            body["diarize"] = "true"
        return body

    async def run(self, gateway: Gateway, request: Request, call: Call, task: TaskRequest) -> Response | None:
        result = await gateway.services.tasks.run_task(task.spec, task.options, call)
        transcription, render = result.transcription, self.format.render
        if len(transcription.text) < _THREAD_CHARACTERS:
            body = render(transcription, self.granularities)
        else:
            body = await asyncio.to_thread(render, transcription, self.granularities)
        return Response(response_headers(call, Content_Type=self.format.content_type), body)

    def stream_format(self, link: Link) -> sse.StreamFormat:
        return sse.StreamFormat(lambda started: None, {}, _render_stream, self.render_error)


# --- results


@dataclass(frozen=True, slots=True)
class _Format:
    """A response format. `render` returns a transcript in it; only verbose JSON uses the granularities."""

    content_type: str
    render: Callable[[Transcription, Collection[str]], bytes]


def _render_json(transcription: Transcription, granularities: Collection[str]) -> bytes:
    return to_json({"text": transcription.text, "usage": _usage(transcription)})


def _render_text(transcription: Transcription, granularities: Collection[str]) -> bytes:
    return transcription.text.encode() + b"\n"


def _render_verbose(transcription: Transcription, granularities: Collection[str]) -> bytes:
    members: dict[str, Any] = {
        "task": "transcribe",
        "language": transcription.language_code,
        "duration": transcription.audio_seconds,
        "text": transcription.text,
    }
    if "word" in granularities:
        members["words"] = [
            {
                "word": word.text,
                "start": from_duration(word.start_offset),
                "end": from_duration(word.end_offset),
            }
            for word in transcription.words
        ]
    if "segment" in granularities:
        members["segments"] = [
            {"id": number, "seek": 0, **times, "text": text, "tokens": [], **_UNKNOWN}
            for number, (times, text, _) in enumerate(_segments(transcription))
        ]
    return to_json(members | {"usage": _usage(transcription)})


# Providers don't report these; SDKs require them.
_UNKNOWN = {"temperature": 0.0, "avg_logprob": 0.0, "compression_ratio": 0.0, "no_speech_prob": 0.0}


def _render_diarized(transcription: Transcription, granularities: Collection[str]) -> bytes:
    segments = [
        {"type": "transcript.text.segment", "id": f"seg_{number}", **times, "text": text, "speaker": speaker}
        for number, (times, text, speaker) in enumerate(_segments(transcription))
    ]
    members = {
        "task": "transcribe",
        "duration": transcription.audio_seconds,
        "text": transcription.text,
        "segments": segments,
        "usage": _usage(transcription),
    }
    return to_json(members)


def _segments(transcription: Transcription) -> Iterator[tuple[dict[str, float], str, str]]:
    """Yields the times, the text and the speaker of each sentence."""
    for sentence in sentences(transcription):
        times = {"start": sentence[0].start / 1000, "end": sentence[-1].end / 1000}
        yield times, join(sentence), sentence[0].speaker


def _usage(transcription: Transcription) -> dict[str, Any]:
    return {"type": "duration", "seconds": transcription.audio_seconds}


_TEXT = "text/plain; charset=utf-8"

FORMATS: Mapping[str, _Format] = {
    "json": _Format("application/json", _render_json),
    "text": _Format(_TEXT, _render_text),
    "verbose_json": _Format("application/json", _render_verbose),
    "diarized_json": _Format("application/json", _render_diarized),
    "srt": _Format(_TEXT, lambda transcription, _: to_srt(transcription).encode()),
    "vtt": _Format("text/vtt", lambda transcription, _: to_vtt(transcription).encode()),
}


# --- streams


def _render_stream(_: None, result: TaskResult) -> bytes:
    text = result.transcription.text
    events = (
        {"type": "transcript.text.delta", "delta": text},
        {"type": "transcript.text.done", "text": text},
    )
    return b"".join([sse.encode_event(to_json(event)) for event in events]) + sse.DONE
