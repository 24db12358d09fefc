"""The shortest job of each kind of task, in words that a test would find again wherever they got to.

`pomelo.testing.suite` offers it to those who examine a provider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput, TextToSpeechInput
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from pomelo.providers.base import AudioSource, Job

PROMPT = "my canary prompt"
SOUND = b"\xff\xfb\x90\xc0" + b"a canary sound" * 100

_INPUTS: Mapping[str, Callable[[], Any]] = {
    "text": lambda: TextInput(messages=[Message(role=Role.ROLE_USER, content=PROMPT)]),
    "image": lambda: ImageInput(prompt=PROMPT),
    "text_to_speech": lambda: TextToSpeechInput(text=PROMPT, voice="adam"),
    "speech_to_speech": lambda: SpeechToSpeechInput(voice="adam"),
    "speech_to_text": SpeechToTextInput,
}


def sample(kind: str, route: Route, given: Any = None, *, limits: Limits | None = None) -> Job[Any]:
    """A job of a kind on a route; without `given` the shortest input there is. Sound comes inline."""
    model = Model(
        name=route.model,
        task_type=TaskType.Value(f"TASK_TYPE_{kind.upper()}"),
        routes=(route,),
        limits=limits or Limits(),
        prices=Prices({PriceUnit.PRICE_UNIT_IMAGE: 1}),
        price_version="test",
    )
    heard = kind in ("speech_to_speech", "speech_to_text")
    audio = AudioSource("audio/mpeg", len(SOUND), data=SOUND) if heard else None
    return Job(f"task_{kind}", model, route, _INPUTS[kind]() if given is None else given, False, 0.0, audio)


def kind_of(job: Job[Any]) -> str:
    """The kind of a job, as providers name their methods."""
    return TaskType.Name(job.model.task_type).removeprefix("TASK_TYPE_").lower()
