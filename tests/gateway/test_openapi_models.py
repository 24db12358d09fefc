"""What the OpenAPI description takes from the models and from the formats of their output."""

from __future__ import annotations

import pytest

from gateway.openapi.document import document
from gateway.openapi.schema import KnownModel
from pomelo.audio_formats import AUDIO_FORMATS
from pomelo.gen.v1.task_pb2 import TaskType


@pytest.mark.parametrize(
    ("task_type", "fields"),
    [
        (TaskType.TASK_TYPE_IMAGE, {"ImageTask": "prompt", "ImageRequest": "prompt"}),
        (TaskType.TASK_TYPE_TEXT_TO_SPEECH, {"TextToSpeechTask": "text", "SpeechRequest": "input"}),
    ],
)
def test_the_most_characters_are_those_of_the_models(
    task_type: TaskType.ValueType, fields: dict[str, str]
) -> None:
    models = {"a": KnownModel(task_type, 400), "b": KnownModel(task_type, 40_000)}
    models["c"] = KnownModel(TaskType.TASK_TYPE_TEXT, 90_000)
    for known, most in ((None, 10_000), (models, 40_000)):
        schemas = document("", known)["components"]["schemas"]
        for name, field in fields.items():
            assert schemas[name]["properties"][field]["maxLength"] == most


@pytest.mark.parametrize("path", ["/api/v1/task", "/v1/audio/speech"])
def test_the_types_of_audio_are_those_of_the_output_formats(path: str) -> None:
    content = document("")["paths"][path]["post"]["responses"]["200"]["content"]
    described = {name for name in content if name.startswith("audio/")}
    sent = {each.content_type.partition(";")[0] for each in AUDIO_FORMATS.values()}
    assert described == sent | {"audio/*"}  # a vendor may send another type than it was asked for
    # By this type openapi-python-client knows that a response without JSON is a file.
    assert ("application/octet-stream" in content) is ("application/json" not in content)
