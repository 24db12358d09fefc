"""JSON bodies and form fields as tasks."""

import base64
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import body
from gateway.fields import FIELDS, KNOWN
from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import ImageFormat
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import Task, TaskType
from pomelo.gen.v1.text_pb2 import Role

TEXT, IMAGE, TTS = TaskType.TASK_TYPE_TEXT, TaskType.TASK_TYPE_IMAGE, TaskType.TASK_TYPE_TEXT_TO_SPEECH
STS, STT = TaskType.TASK_TYPE_SPEECH_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_TEXT
HI = [{"role": "user", "content": "Hi"}]


def make(kind: int, values: dict[str, Any], *, form: bool = False) -> Task:
    return body.make_task("m", kind, values, form=form)[0]


def fault(kind: int, values: dict[str, Any], *, form: bool = False) -> PomeloError:
    with pytest.raises(PomeloError) as caught:
        make(kind, values, form=form)
    return caught.value


def test_every_field_of_a_text_task_reaches_its_message() -> None:
    values = {
        "messages": HI,
        "max_tokens": 100,
        "temperature": 0.7,
        "top_p": 1,
        "stop": ["a", "b"],
        "seed": 2**53 - 1,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "user": "u",
    }
    text = make(TEXT, values).text
    assert {f.name for f, _ in text.ListFields()} == set(FIELDS[TEXT])
    assert (text.messages[0].role, text.messages[0].content) == (Role.ROLE_USER, "Hi")
    assert (text.max_tokens, text.temperature, text.top_p, list(text.stop)) == (100, 0.7, 1.0, ["a", "b"])


def test_every_field_of_the_other_kinds_reaches_its_message() -> None:
    speech = {
        "voice": "adam",
        "voice_settings": {"stability": 0.5, "use_speaker_boost": True, "speed": 1},
        "output_format": "mp3_44100_128",
        "seed": 1,
        "response_format": "url",
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
    }
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (IMAGE, "image", image),
        (TTS, "text_to_speech", {"text": "t", "language_code": "en", **speech}),
        (STS, "speech_to_speech", speech),
        (
            STT,
            "speech_to_text",
            {"language_code": "en", "diarize": True, "num_speakers": 2, "timestamps": "none"},
        ),
    ]
    for kind, name, values in cases:
        message = getattr(make(kind, values), name)
        assert {f.name for f, _ in message.ListFields()} == set(FIELDS[kind]) == set(values)
    assert make(IMAGE, image).image.output_format == ImageFormat.IMAGE_FORMAT_JPEG


def test_a_medium_comes_back_both_ways_unless_the_caller_says_how() -> None:
    assert make(IMAGE, {"prompt": "p"}).image.response_format == ResponseFormat.RESPONSE_FORMAT_BOTH
    assert make(STS, {}).speech_to_speech.response_format == ResponseFormat.RESPONSE_FORMAT_BOTH


def test_null_is_absence() -> None:
    task = make(TEXT, {"messages": HI, **dict.fromkeys(FIELDS[TEXT].keys() - {"messages"}), "stream": None})
    assert [f.name for f, _ in task.text.ListFields()] == ["messages"]


def test_a_field_of_another_kind_is_ignored_whatever_its_value() -> None:
    task = make(IMAGE, {"prompt": "p", "messages": 7, "voice": [], "audio": {}, "max_tokens": "many"})
    assert task.image.prompt == "p"


def test_a_field_that_no_kind_knows_is_named() -> None:
    error = fault(TEXT, {"messages": HI, "max_token": 1})
    assert (error.code, error.field) == ("invalid_parameter", "max_token")
    assert "max_token" in error.message


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (TEXT, {"max_tokens": True}, "max_tokens"),
        (TEXT, {"max_tokens": "100"}, "max_tokens"),
        (TEXT, {"max_tokens": 1.5}, "max_tokens"),
        (TEXT, {"max_tokens": 2**63}, "max_tokens"),
        (TEXT, {"max_tokens": -(2**63) - 1}, "max_tokens"),
        (TEXT, {"max_tokens": 1e300}, "max_tokens"),
        (TEXT, {"max_tokens": math.inf}, "max_tokens"),
        (TEXT, {"temperature": "0.7"}, "temperature"),
        (TEXT, {"temperature": False}, "temperature"),
        (TEXT, {"temperature": math.inf}, "temperature"),
        (TEXT, {"temperature": 10**400}, "temperature"),
        (TEXT, {"user": 1}, "user"),
        (TEXT, {"stop": 1}, "stop"),
        (TEXT, {"stop": ["a", 1]}, "stop[1]"),
        (TEXT, {"stream": 1}, "stream"),
        (TEXT, {"stream": "true"}, "stream"),
        (TEXT, {"messages": "Hi"}, "messages"),
        (TEXT, {"messages": [1]}, "messages[0]"),
        (TEXT, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (TEXT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (TEXT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        (TEXT, {"messages": [*HI, {"role": "user"}]}, "messages[1].content"),
        (TEXT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (TEXT, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (TEXT, {"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo"),
        (TEXT, {"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]"),
        (TEXT, {"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
        (TEXT, {"messages": [{"role": "user", "content": [{"type": {}}]}]}, "messages[0].content[0].type"),
        (
            TEXT,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            TEXT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "a": 1}]}]},
            "messages[0].content[0].a",
        ),
        (
            TEXT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url.url",
        ),
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
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    kind: int, values: dict[str, Any], field: str
) -> None:
    error = fault(kind, values)
    assert error.code in ("invalid_parameter", "missing_parameter")
    assert error.field == field
    assert field in error.message


def test_a_float_that_is_a_whole_number_is_taken_as_one() -> None:
    assert make(TEXT, {"max_tokens": 100.0}).text.max_tokens == 100


def test_parts_of_a_message_may_name_a_picture_by_object_or_by_text() -> None:
    parts = [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "image_url", "image_url": "data:image/png;base64,AQ=="},
    ]
    message = make(TEXT, {"messages": [{"role": "user", "content": parts}]}).text.messages[0]
    assert message.parts.parts[0].text == "what is it?"
    assert [p.image_url.url[-4:] for p in message.parts.parts[1:]] == ["AA==", "AQ=="]


def test_the_texts_of_a_form_mean_what_the_same_json_means() -> None:
    texts = {
        "messages": '[{"role":"user","content":"Hi"}]',
        "max_tokens": "100",
        "temperature": "0.7",
        "stop": '["a","b"]',
        "user": "42",
        "width": "x",
    }
    values = {"messages": HI, "max_tokens": 100, "temperature": 0.7, "stop": ["a", "b"], "user": "42"}
    assert make(TEXT, texts, form=True) == make(TEXT, values)
    assert list(make(TEXT, {"stop": "[END]"}, form=True).text.stop) == ["[END]"]
    assert body.make_task("m", TEXT, {"stream": "True"}, form=True)[2] is True
    assert make(STT, {"diarize": "true"}, form=True).speech_to_text.diarize
    settings = make(TTS, {"voice_settings": '{"stability": 0.5}'}, form=True).text_to_speech.voice_settings
    assert settings.stability == 0.5


@pytest.mark.parametrize(
    ("kind", "texts", "field"),
    [
        (TEXT, {"max_tokens": ""}, "max_tokens"),
        (TEXT, {"max_tokens": "ten"}, "max_tokens"),
        (TEXT, {"max_tokens": "9" * 5000}, "max_tokens"),
        (TEXT, {"temperature": "NaN"}, "temperature"),
        (TEXT, {"messages": "Hi"}, "messages"),
        (TEXT, {"stream": "1"}, "stream"),
        (STT, {"diarize": "on"}, "diarize"),
        (TTS, {"voice_settings": "{"}, "voice_settings"),
    ],
)
def test_the_text_of_a_form_that_is_no_such_value_is_refused(
    kind: int, texts: dict[str, Any], field: str
) -> None:
    assert fault(kind, texts, form=True).field == field


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"a":NaN}',
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b'{"a":1}x',
        b"[" * 100_000,
        b'{"a":' * 300 + b"1" + b"}" * 300,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_an_invalid_body(data: bytes) -> None:
    with pytest.raises(PomeloError) as caught:
        body.parse(data)
    assert caught.value.code == "invalid_body"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "x"]), JSON | st.just("user"), max_size=3)


@given(
    st.sampled_from(list(FIELDS)),
    st.dictionaries(
        st.sampled_from(sorted(KNOWN)) | st.text(max_size=3), JSON | st.lists(MESSAGE, max_size=2), max_size=5
    ),
    st.booleans(),
)
def test_any_json_makes_a_task_or_a_refusal_and_nothing_else(
    kind: int, values: dict[str, Any], form: bool
) -> None:
    if form:
        values = {k: str(v) for k, v in values.items()}
    try:
        task = make(kind, values, form=form)
    except PomeloError as error:
        status = error.row.http
    else:
        status = 200
        assert Task.FromString(task.SerializeToString()) == task
    assert status in (200, 400)


def decode_audio(value: Any) -> tuple[str, bytes]:
    """The media type and the bytes of audio, read by the steps of the request path."""
    content_type, text = body.read_audio(value)
    return content_type, body.check_audio(b"".join(body.decode_base64(text)))


def test_audio_is_base64_plain_or_wrapped_or_a_data_uri() -> None:
    sound = bytes(range(256))
    plain = base64.b64encode(sound).decode()
    assert decode_audio(plain) == ("", sound)
    assert decode_audio(base64.encodebytes(sound).decode()) == ("", sound)
    assert decode_audio(f"data:audio/mpeg;base64,{plain}") == ("audio/mpeg", sound)
    assert decode_audio(f"data:audio/pcm;rate=16000;base64,{plain}") == ("audio/pcm;rate=16000", sound)
    assert decode_audio(f"data:;base64,{plain}") == ("", sound)


@pytest.mark.parametrize("value", ["", "!", "AAA", "A===", "data:audio/mpeg,AAAA", "data:", 7, ["AAAA"], "é"])
def test_audio_that_is_no_base64_is_refused(value: Any) -> None:
    with pytest.raises(PomeloError) as caught:
        decode_audio(value)
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", "audio")


def test_a_model_must_be_named_by_a_text() -> None:
    for values, code in (({}, "missing_parameter"), ({"model": None}, "missing_parameter")):
        with pytest.raises(PomeloError) as caught:
            body.model_of(values)
        assert (caught.value.code, caught.value.field) == (code, "model")
    with pytest.raises(PomeloError) as caught:
        body.model_of({"model": ["gpt-4"]})
    assert caught.value.code == "invalid_parameter"
