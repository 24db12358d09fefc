"""The values of a body or a form as the fields of a task."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.parsing.task import build_task, model_of
from gateway.types import FIELD_NAMES, TASK_FORMATS
from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import ImageFormat
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.speech_pb2 import TimestampGranularity
from pomelo.gen.v1.task_pb2 import TaskSpec, TaskType
from pomelo.gen.v1.text_pb2 import ContentPart, ReasoningEffort, Role
from tests.gateway.requests import code_of_field

TEXT, IMAGE, TTS = TaskType.TASK_TYPE_TEXT, TaskType.TASK_TYPE_IMAGE, TaskType.TASK_TYPE_TEXT_TO_SPEECH
STS, STT = TaskType.TASK_TYPE_SPEECH_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_TEXT
HI = [{"role": "user", "content": "Hi"}]
WITHOUT_EFFECT = {"n", "logprobs", "top_logprobs", "logit_bias"}


def build(task_type: int, values: dict[str, Any], *, form: bool = False) -> TaskSpec:
    return build_task("m", task_type, values, form=form).spec


def delivery(task_type: int, values: dict[str, Any]) -> int:
    return build_task("m", task_type, values).options.delivery


def refusal(task_type: int, values: dict[str, Any], *, form: bool = False) -> PomeloError:
    with pytest.raises(PomeloError) as caught:
        build(task_type, values, form=form)
    return caught.value


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


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
@pytest.mark.parametrize("task_type", TASK_FORMATS)
def test_a_field_that_the_task_type_does_not_have_is_refused_and_named(task_type: int, form: bool) -> None:
    others = FIELD_NAMES - TASK_FORMATS[task_type].fields.keys() - {"model", "stream", "audio"}
    for name in [*others, "max_token", *(() if TASK_FORMATS[task_type].takes_audio else ("audio",))]:
        error = refusal(task_type, {name: "x"}, form=form)
        assert (error.code, error.field) == ("invalid_parameter", name)
        assert name in error.message
        assert TASK_FORMATS[task_type].name in error.message


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
    ("task_type", "values", "field"),
    [
        *[(TEXT, {"max_tokens": value}, "max_tokens") for value in (True, "100", 1.5, 1e300, math.inf)],
        *[(TEXT, {"max_tokens": value}, "max_tokens") for value in (2**63, -(2**63) - 1)],
        *[(TEXT, {"temperature": value}, "temperature") for value in ("0.7", False, math.inf, 10**400)],
        *[(TEXT, {"stream": value}, "stream") for value in (1, "true")],
        (TEXT, {"user": 1}, "user"),
        (TEXT, {"stop": 1}, "stop"),
        (TEXT, {"stop": ["a", 1]}, "stop[1]"),
        (TEXT, {"messages": "Hi"}, "messages"),
        (TEXT, {"messages": [1]}, "messages[0]"),
        (TEXT, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (TEXT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (TEXT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        (TEXT, {"messages": [*HI, {"role": "user"}]}, "messages[1].content"),
        (TEXT, {"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo"),
        *[
            (TEXT, {"messages": [{"role": "user", "content": content}]}, f"messages[0].content{path}")
            for content, path in (
                (None, ""),
                (1, ""),
                ([1], "[0]"),
                ([{}], "[0].type"),
                ([{"type": {}}], "[0].type"),
                ([{"type": "text"}], "[0].text"),
                ([{"type": "text", "text": "x", "a": 1}], "[0].a"),
                ([{"type": "image_url", "image_url": {}}], "[0].image_url.url"),
            )
        ],
        (IMAGE, {"width": 2**31}, "width"),
        (IMAGE, {"width": None, "prompt": ["x"]}, "prompt"),
        (IMAGE, {"output_format": "gif"}, "output_format"),
        (IMAGE, {"output_format": []}, "output_format"),
        (IMAGE, {"response_format": "both"}, "response_format"),
        (TTS, {"voice_settings": []}, "voice_settings"),
        (TTS, {"voice_settings": {"stability": "x"}}, "voice_settings.stability"),
        (TTS, {"voice_settings": {"use_speaker_boost": 1}}, "voice_settings.use_speaker_boost"),
        (TTS, {"voice_settings": {"pitch": 1}}, "voice_settings.pitch"),
        (STT, {"diarize": "yes"}, "diarize"),
        (STT, {"timestamps": "line"}, "timestamps"),
    ],
)
def test_an_invalid_value_is_refused_and_its_field_named(
    task_type: int, values: dict[str, Any], field: str
) -> None:
    error = refusal(task_type, values)
    assert (error.code, error.field) == (code_of_field(values, field), field)
    assert field in error.message


def test_the_refusal_of_a_choice_lists_the_others_without_aliases() -> None:
    message = refusal(IMAGE, {"output_format": "gif"}).message
    assert message == "Invalid output_format: must be one of png, jpeg, webp"


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


@pytest.mark.parametrize(
    ("name", "value"), [("n", 1), ("n", 1.0), ("top_logprobs", 0), ("logprobs", False), ("logit_bias", {})]
)
def test_a_field_that_asks_for_nothing_is_accepted(name: str, value: Any) -> None:
    assert build(TEXT, {"messages": HI, name: value}) == build(TEXT, {"messages": HI})


@pytest.mark.parametrize(
    ("name", "value"), [("n", True), ("n", 2), ("n", 1.5), ("n", "1"), ("logprobs", 0), ("top_logprobs", 1)]
)
def test_a_field_that_asks_for_what_no_model_has_is_refused(name: str, value: Any) -> None:
    assert refusal(TEXT, {"messages": HI, name: value}).field == name


@pytest.mark.parametrize("field", ["stability", "similarity_boost", "style", "speed", "use_speaker_boost"])
def test_a_voice_setting_that_is_null_is_absent(field: str) -> None:
    settings = build(TTS, {"voice_settings": {field: None}}).text_to_speech.voice_settings
    assert settings.ListFields() == []


@pytest.mark.parametrize("field", ["details", "URL", "x"])
def test_an_image_url_object_has_only_the_fields_url_and_detail(field: str) -> None:
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "x"]), JSON | st.just("user"), max_size=3)


@given(
    st.sampled_from(list(TASK_FORMATS)),
    st.dictionaries(
        st.sampled_from(sorted(FIELD_NAMES)) | st.text(max_size=3),
        JSON | st.lists(MESSAGE, max_size=2),
        max_size=5,
    ),
    st.booleans(),
)
def test_any_json_results_in_a_task_or_a_400(task_type: int, values: dict[str, Any], form: bool) -> None:
    if form:
        values = {k: str(v) for k, v in values.items()}
    try:
        task = build(task_type, values, form=form)
    except PomeloError as error:
        status = error.row.http
    else:
        status = 200
        assert TaskSpec.FromString(task.SerializeToString()) == task
    assert status in (200, 400)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({}, "missing_parameter"),
        ({"model": None}, "missing_parameter"),
        ({"model": ""}, "missing_parameter"),
        ({"model": ["gpt-4"]}, "invalid_parameter"),
    ],
)
def test_the_model_must_be_a_string_that_is_not_empty(values: dict[str, Any], code: str) -> None:
    with pytest.raises(PomeloError) as caught:
        model_of(values)
    assert (caught.value.code, caught.value.field) == (code, "model")


def test_an_object_in_a_form_has_each_name_once() -> None:
    for text, code in (('{"speed": 1}', ""), ('{"speed": 1, "speed": 1.1}', "invalid_parameter")):
        values = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam", "voice_settings": text}
        found = ""
        try:
            build_task("eleven-labs-tts", TTS, values, form=True)
        except PomeloError as error:
            found = error.code
        assert found == code
