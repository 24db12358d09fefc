"""The values of a body or a form as the fields of a task."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.parsing.task import build_task
from gateway.types import FIELD_NAMES, TASK_FORMATS
from pomelo.gen.v1.image_pb2 import ImageFormat
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.speech_pb2 import TimestampGranularity
from pomelo.gen.v1.text_pb2 import ContentPart, ReasoningEffort, Role
from tests.gateway.fields import HI, IMAGE, STS, STT, TEXT, TTS, build, refusal

WITHOUT_EFFECT = {"n", "logprobs", "top_logprobs", "logit_bias"}


def delivery(task_type: int, values: dict[str, Any]) -> int:
    return build_task("m", task_type, values).options.delivery


def test_every_field_of_a_text_task_is_set_in_the_message() -> None:
    values = {
        "messages": HI,
        "max_tokens": 100,
        "temperature": 0.7,
        "top_p": 1,
        "stop": ["a", "b"],
        "seed": 2**53 - 1,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "reasoning_effort": "xhigh",
        "user": "u",
        "metadata": {"team": "a"},
    }
    task = build(TEXT, values)
    text = task.text
    assert set(values) | WITHOUT_EFFECT == set(TASK_FORMATS[TEXT].fields)
    of_message = {f.name for f, _ in text.ListFields()}
    assert of_message == set(values) - {"user", "metadata", "response_format"} | {"format"}
    assert (task.user, dict(task.metadata)) == ("u", {"team": "a"})
    assert text.reasoning_effort == ReasoningEffort.REASONING_EFFORT_XHIGH
    (message,) = text.messages
    assert (message.role, list(message.content)) == (Role.ROLE_USER, [ContentPart(text="Hi")])
    assert (text.max_tokens, text.temperature, text.top_p, list(text.stop)) == (100, 0.7, 1.0, ["a", "b"])


def test_every_field_of_the_other_task_types_is_set_in_the_message() -> None:
    speech = {
        "voice": "adam",
        "voice_settings": {"stability": 0.5, "use_speaker_boost": True, "speed": 1},
        "output_format": "mp3_44100_128",
        "seed": 1,
        "response_format": "url",
        "metadata": {"team": "a"},
    }
    image = {
        "prompt": "p",
        "width": 1024,
        "height": 512,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "seed": 42,
        "output_format": "jpg",
        "response_format": "b64_json",
        "metadata": {"team": "a"},
    }
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (IMAGE, "image", image),
        (TTS, "text_to_speech", {"text": "t", "language_code": "en", **speech}),
        (STS, "speech_to_speech", speech),
        (
            STT,
            "speech_to_text",
            {
                "language_code": "en",
                "diarize": True,
                "num_speakers": 2,
                "timestamps": "none",
                "metadata": {"team": "a"},
            },
        ),
    ]
    for task_type, name, values in cases:
        message = getattr(build(task_type, values), name)
        assert set(values) == set(TASK_FORMATS[task_type].fields)
        assert {f.name for f, _ in message.ListFields()} == set(values) - {"response_format", "metadata"}
        assert dict(build(task_type, values).metadata) == {"team": "a"}
    assert [delivery(task_type, values) for task_type, _, values in cases] == [
        MediaDelivery.MEDIA_DELIVERY_INLINE,
        MediaDelivery.MEDIA_DELIVERY_LINK,
        MediaDelivery.MEDIA_DELIVERY_LINK,
        MediaDelivery.MEDIA_DELIVERY_UNSPECIFIED,
    ]
    assert build(IMAGE, image).image.output_format == ImageFormat.IMAGE_FORMAT_JPEG


def test_media_is_returned_as_link_and_base64_by_default() -> None:
    assert delivery(IMAGE, {"prompt": "p"}) == MediaDelivery.MEDIA_DELIVERY_BOTH
    assert delivery(STS, {}) == MediaDelivery.MEDIA_DELIVERY_BOTH


@pytest.mark.parametrize(("task_type", "stream"), [(IMAGE, True), (STS, True), (TEXT, False), (STT, False)])
def test_a_stream_and_a_result_without_media_leave_the_delivery_to_the_server(
    task_type: int, stream: bool
) -> None:
    assert delivery(task_type, {"stream": stream}) == MediaDelivery.MEDIA_DELIVERY_UNSPECIFIED


def test_null_equals_an_absent_field() -> None:
    task = build(
        TEXT,
        {"messages": HI, **dict.fromkeys(TASK_FORMATS[TEXT].fields.keys() - {"messages"}), "stream": None},
    )
    assert [f.name for f, _ in task.text.ListFields()] == ["messages"]
    assert task.user == ""


def test_null_is_ignored_in_every_field() -> None:
    nulls = dict.fromkeys([*FIELD_NAMES, "tools"])
    assert build(IMAGE, {**nulls, "prompt": "p"}) == build(IMAGE, {"prompt": "p"})
    part = {"type": "image_url", "text": None, "image_url": {"url": "data:", "detail": None}}
    response = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None}
    task = build(TEXT, {"messages": [response, {"role": "user", "name": None, "content": [part]}]})
    contents = [message.content for message in task.text.messages]
    assert [[part.WhichOneof("part") for part in content] for content in contents] == [["text"], ["image"]]
    settings = build(TTS, {"voice_settings": {"pitch": None, "speed": 1}}).text_to_speech.voice_settings
    assert [f.name for f, _ in settings.ListFields()] == ["speed"]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "x"},
        {"role": None, "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
    ],
    ids=str,
)
def test_a_message_without_a_role_or_content_is_left_to_the_engine(message: dict[str, Any]) -> None:
    """The engine names the first wrong message, as it does over gRPC."""
    first, second = build(TEXT, {"messages": [message, {"role": "user", "content": []}]}).text.messages
    assert not first.role or not first.content
    assert not second.content


def test_a_float_without_a_fraction_is_accepted_as_an_integer() -> None:
    assert build(TEXT, {"max_tokens": 100.0}).text.max_tokens == 100


def test_an_image_part_may_be_an_object_or_a_string() -> None:
    parts = [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "image_url", "image_url": "data:image/png;base64,AQ=="},
    ]
    message = build(TEXT, {"messages": [{"role": "user", "content": parts}]}).text.messages[0]
    assert message.content[0].text == "what is it?"
    assert [part.image.source.url for part in message.content[1:]] == [
        "data:image/png;base64,AA==",
        "data:image/png;base64,AQ==",
    ]


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
        (IMAGE, "response_format", "url", MediaDelivery.MEDIA_DELIVERY_LINK),
        (TTS, "response_format", "b64_json", MediaDelivery.MEDIA_DELIVERY_INLINE),
        (STT, "timestamps", "none", TimestampGranularity.TIMESTAMP_GRANULARITY_NONE),
        (STT, "timestamps", "word", TimestampGranularity.TIMESTAMP_GRANULARITY_WORD),
        (STT, "timestamps", "character", TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER),
    ],
)
def test_each_choice_sets_its_enum_value(task_type: int, field: str, value: str, meaning: int) -> None:
    parsed = build_task("m", task_type, {field: value})
    given = parsed.options.delivery if field == "response_format" else getattr(parsed.input, field)
    assert given == meaning


@pytest.mark.parametrize(
    "content", ["Hi", [{"type": "text", "text": "Hi"}]], ids=["a text", "a list of parts"]
)
def test_each_role_sets_its_enum_value(content: Any) -> None:
    messages = [{"role": role, "content": content} for role in ("system", "user", "assistant")]
    roles = [message.role for message in build(TEXT, {"messages": messages}).text.messages]
    assert roles == [Role.ROLE_SYSTEM, Role.ROLE_USER, Role.ROLE_ASSISTANT]


@pytest.mark.parametrize("field", ["stability", "similarity_boost", "style", "speed", "use_speaker_boost"])
def test_a_voice_setting_that_is_null_is_absent(field: str) -> None:
    settings = build(TTS, {"voice_settings": {field: None}}).text_to_speech.voice_settings
    assert settings.ListFields() == []


@pytest.mark.parametrize("task_type", [TEXT, IMAGE, TTS, STS, STT])
def test_a_task_without_fields_still_has_its_type(task_type: int) -> None:
    assert build(task_type, {"stream": True}).WhichOneof("input") == TASK_FORMATS[task_type].input


@pytest.mark.parametrize("task_type", [TTS, STS])
def test_voice_settings_without_members_are_given(task_type: int) -> None:
    spec = build(task_type, {"voice_settings": {}})
    assert getattr(spec, spec.WhichOneof("input") or "").HasField("voice_settings")
