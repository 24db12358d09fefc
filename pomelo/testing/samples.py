"""The shortest job of each task type, with texts that a test finds again wherever they appear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput, TextToSpeechInput
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import ContentPart, Message, Role, TextInput
from pomelo.protobuf.enums import enum_names
from pomelo.providers.base import AudioSource, Job

PROMPT = "my canary prompt"
AUDIO = b"\xff\xfb\x90\xc0" + b"a canary sound" * 100

_INPUTS: Mapping[str, Callable[[], Any]] = {
    "text": lambda: TextInput(messages=[Message(role=Role.ROLE_USER, content=[ContentPart(text=PROMPT)])]),
    "image": lambda: ImageInput(prompt=PROMPT),
    "text_to_speech": lambda: TextToSpeechInput(text=PROMPT, voice="adam"),
    "speech_to_speech": lambda: SpeechToSpeechInput(voice="adam"),
    "speech_to_text": SpeechToTextInput,
}


def sample(task_type: str, route: Route, task_input: Any = None, *, limits: Limits | None = None) -> Job[Any]:
    """Return a job of a task type on a route, with the shortest input by default. Audio is inline."""
    model = Model(
        name=route.model,
        task_type=TaskType.Value(f"TASK_TYPE_{task_type.upper()}"),
        routes=(route,),
        limits=limits or Limits(),
        prices=Prices({PriceUnit.PRICE_UNIT_IMAGE: 1}),
        price_version="test",
    )
    has_audio = task_type in ("speech_to_speech", "speech_to_text")
    audio = AudioSource("audio/mpeg", len(AUDIO), data=AUDIO) if has_audio else None
    if task_input is None:
        task_input = _INPUTS[task_type]()
    return Job(f"task_{task_type}", model, route, task_input, False, 0.0, audio)


def task_type_of(job: Job[Any]) -> str:
    """Return the task type of a job, as providers name their methods."""
    return enum_names(TaskType.DESCRIPTOR)[job.model.task_type]
