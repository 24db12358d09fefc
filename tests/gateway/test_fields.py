"""Values of a task's fields at the edges of what is accepted, and how each choice is understood."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.parsing.json import parse_json
from gateway.parsing.task import build_task, model_of
from gateway.types import TASK_FORMATS
from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import ImageFormat
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.speech_pb2 import Timestamps
from pomelo.gen.v1.task_pb2 import Task, TaskType
from pomelo.gen.v1.text_pb2 import Role

TEXT, IMAGE, TTS = TaskType.TASK_TYPE_TEXT, TaskType.TASK_TYPE_IMAGE, TaskType.TASK_TYPE_TEXT_TO_SPEECH
STS, STT = TaskType.TASK_TYPE_SPEECH_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_TEXT


def build(task_type: int, values: dict[str, Any], *, form: bool = False) -> Task:
    """The task that a body's values become."""
    return build_task("m", task_type, values, form=form).task


def refusal(task_type: int, values: dict[str, Any]) -> PomeloError:
    """The error that values are refused with."""
    with pytest.raises(PomeloError) as caught:
        build(task_type, values)
    return caught.value


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 0])
def test_an_integer_may_use_all_64_bits(value: int) -> None:
    assert build(TEXT, {"seed": value}).text.seed == value


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), 0])
def test_a_size_may_use_all_32_bits(value: int) -> None:
    assert build(IMAGE, {"width": value}).image.width == value
    for beyond in (2**31, -(2**31) - 1):
        assert refusal(IMAGE, {"width": beyond}).field == "width"


@pytest.mark.parametrize(
    ("task_type", "field", "value", "meaning"),
    [
        (IMAGE, "output_format", "png", ImageFormat.IMAGE_FORMAT_PNG),
        (IMAGE, "output_format", "jpeg", ImageFormat.IMAGE_FORMAT_JPEG),
        (IMAGE, "output_format", "jpg", ImageFormat.IMAGE_FORMAT_JPEG),
        (IMAGE, "output_format", "webp", ImageFormat.IMAGE_FORMAT_WEBP),
        (IMAGE, "response_format", "url", ResponseFormat.RESPONSE_FORMAT_URL),
        (TTS, "response_format", "b64_json", ResponseFormat.RESPONSE_FORMAT_B64_JSON),
        (STT, "timestamps", "none", Timestamps.TIMESTAMPS_NONE),
        (STT, "timestamps", "word", Timestamps.TIMESTAMPS_WORD),
        (STT, "timestamps", "character", Timestamps.TIMESTAMPS_CHARACTER),
    ],
)
def test_each_choice_sets_its_enum_value(task_type: int, field: str, value: str, meaning: int) -> None:
    task = build(task_type, {field: value})
    given = getattr(task, str(task.WhichOneof("input")))
    assert getattr(given, field) == meaning


@pytest.mark.parametrize(
    "content", ["Hi", [{"type": "text", "text": "Hi"}]], ids=["a text", "a list of parts"]
)
def test_each_role_sets_its_enum_value(content: Any) -> None:
    messages = [{"role": role, "content": content} for role in ("system", "user", "assistant")]
    roles = [message.role for message in build(TEXT, {"messages": messages}).text.messages]
    assert roles == [Role.ROLE_SYSTEM, Role.ROLE_USER, Role.ROLE_ASSISTANT]


@pytest.mark.parametrize(
    ("text", "stop"), [("[]", []), ('["a"]', ["a"]), ("[a]", ["[a]"]), ("a", ["a"]), ("[", ["["])]
)
def test_stop_in_a_form_is_a_list_only_if_written_as_one(text: str, stop: list[str]) -> None:
    assert list(build(TEXT, {"stop": text}, form=True).text.stop) == stop


@pytest.mark.parametrize("field", ["stability", "similarity_boost", "style", "speed", "use_speaker_boost"])
def test_a_voice_setting_that_is_null_is_absent(field: str) -> None:
    settings = build(TTS, {"voice_settings": {field: None}}).text_to_speech.voice_settings
    assert settings.ListFields() == []


@pytest.mark.parametrize("field", ["detail", "URL", "x"])
def test_an_image_url_object_has_only_the_field_url(field: str) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", field: "high"}}
    error = refusal(TEXT, {"messages": [{"role": "user", "content": [part]}]})
    assert (error.code, error.field) == (
        "invalid_parameter",
        f"messages[0].content[0].image_url.{field}",
    )


@pytest.mark.parametrize(("length", "shown"), [(100, "x" * 100), (101, "x" * 100 + "…")])
def test_the_name_of_an_unknown_field_is_shown_up_to_100_characters(length: int, shown: str) -> None:
    assert refusal(TEXT, {"x" * length: 1}).field == shown


@pytest.mark.parametrize("task_type", [TEXT, IMAGE, TTS, STS, STT])
def test_a_task_without_fields_still_has_its_type(task_type: int) -> None:
    assert build(task_type, {"stream": True}).WhichOneof("input") == TASK_FORMATS[task_type].input


@pytest.mark.parametrize("name", [None, ""])
def test_an_empty_model_is_a_missing_one(name: str | None) -> None:
    with pytest.raises(PomeloError) as caught:
        model_of({"model": name})
    assert (caught.value.code, caught.value.field) == ("missing_parameter", "model")


@pytest.mark.parametrize("data", [b'{"model":"a","model":"b"}', b'{"a":{"b":[{"c":1,"c":1}]}}'])
def test_a_duplicate_name_in_an_object_is_refused(data: bytes) -> None:
    with pytest.raises(PomeloError) as caught:
        parse_json(data)
    assert caught.value.code == "invalid_parameter"
