"""Tasks of every kind, and calls that bear a key: what the tests of the gRPC door ask with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from pomelo.call import Call
from pomelo.gen.v1 import image_pb2, media_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import Task

KINDS = ("text", "image", "text_to_speech", "speech_to_speech", "speech_to_text")
SOUND = b"some sound " * 400


def text_task(prompt: str = "Hello, world!", model: str = "gpt-4") -> Task:
    """A conversation of one message."""
    message = text_pb2.Message(role=text_pb2.ROLE_USER, content=prompt)
    return Task(model=model, text=text_pb2.TextInput(messages=[message]))


def task_of(kind: str) -> Task:
    """A small task of a kind."""
    audio = speech_pb2.AudioInput(data=SOUND, content_type="audio/mpeg")
    match kind:
        case "image":
            return Task(model="flux-1-pro", image=image_pb2.ImageInput(prompt="A kite", width=64, height=64))
        case "text_to_speech":
            spoken = speech_pb2.TextToSpeechInput(text="Good morning.", voice="adam")
            spoken.response_format = media_pb2.RESPONSE_FORMAT_BOTH
            return Task(model="eleven-labs-tts", text_to_speech=spoken)
        case "speech_to_speech":
            given = speech_pb2.SpeechToSpeechInput(audio=audio, voice="adam")
            return Task(model="eleven-labs-sts", speech_to_speech=given)
        case "speech_to_text":
            return Task(model="eleven-labs-stt", speech_to_text=speech_pb2.SpeechToTextInput(audio=audio))
    return text_task()


def output_of(kind: str) -> str:
    """The name of the output of a kind."""
    return {"text": "text", "image": "image", "speech_to_text": "transcription"}.get(kind, "speech")


def bearer(key: str, **more: str) -> list[tuple[str, str]]:
    """Metadata of a caller; `_` stands for `-`."""
    return [("authorization", f"Bearer {key}"), *((k.replace("_", "-"), v) for k, v in more.items())]


def call_of(key: str | None, timeout: float = 20.0, **headers: str) -> Call:
    """A call as the REST door makes one."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        given["authorization"] = f"Bearer {key}"
    call = Call.from_headers(given.get, protocol="rest")
    call.deadline = time.monotonic() + timeout
    return call


def reason_of(error: Any) -> str:
    """The code in the details of an AioRpcError; empty when it has none."""
    status = status_pb2.Status()
    info = error_details_pb2.ErrorInfo()
    status.ParseFromString(dict(error.trailing_metadata()).get("grpc-status-details-bin", b""))
    for detail in status.details:
        if detail.Unpack(info):
            assert info.domain == "pomelo"
    return info.reason.lower()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error that ends a call; an assertion fails when it succeeds."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end(call)
    return caught.value


async def end(call: Any) -> None:
    """Read a unary or streaming call to its end."""
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


def text_of(metadata: Any) -> Mapping[str, str]:
    """Metadata as a dict."""
    return {str(key): str(value) for key, value in metadata or ()}
