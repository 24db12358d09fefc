"""The values of a body or a form that the fields of a task do not accept."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.parsing.task import build_task, model_of
from gateway.types import FIELD_NAMES, TASK_FORMATS
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskSpec
from tests.gateway.fields import IMAGE, STT, TEXT, TTS, build, refusal
from tests.gateway.requests import code_of_field


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
@pytest.mark.parametrize("task_type", TASK_FORMATS)
def test_a_field_that_the_task_type_does_not_have_is_refused_and_named(task_type: int, form: bool) -> None:
    others = FIELD_NAMES - TASK_FORMATS[task_type].fields.keys() - {"model", "stream", "audio"}
    for name in [*others, "max_token", *(() if TASK_FORMATS[task_type].takes_audio else ("audio",))]:
        error = refusal(task_type, {name: "x"}, form=form)
        assert (error.code, error.field) == ("invalid_parameter", name)
        assert name in error.message
        assert TASK_FORMATS[task_type].name in error.message


@pytest.mark.parametrize(
    ("task_type", "values", "advice"),
    [
        (TEXT, {"maxTokens": 5}, "maxTokens. Use max_tokens, or leave it out"),
        (TEXT, {"temprature": 1}, "temprature. Use temperature, or leave it out"),
        (TEXT, {"Stream": True}, "Stream. Use stream, or leave it out"),
        (TTS, {"speed": 1}, "speed. Use voice_settings.speed, or leave it out"),
        (
            TTS,
            {"voice_settings.speed": 1},
            "voice_settings.speed. Send voice_settings as an object with speed",
        ),
        (TTS, {"voice_settings": {"stabilty": 1}}, "Use voice_settings.stability, or leave it out"),
        (TTS, {"voice_settings": {"pitch": 1}}, "voice_settings.pitch. Leave it out"),
        (TEXT, {"messages": [{"role": "user", "contents": "x"}]}, "Use messages[0].content, or leave it out"),
        (TEXT, {"messages": [{"role": "user", "text": "x"}]}, "messages[0].text. Leave it out"),
        (
            STT,
            {"file": "x"},
            "Unknown field for speech-to-text models: file. Leave it out, or use one of audio, language_code, "
            "diarize, num_speakers, timestamps, metadata, stream",
        ),
        (TEXT, {"max_tokens" + "_" * 54: 1}, "_. Use max_tokens, or leave it out"),
        (TEXT, {"max_tokens" + "_" * 55: 1}, "_. Leave it out, or use one of "),
        (IMAGE, {"x" * 65: 1}, "Leave it out, or use one of prompt, width, height, num_inference_steps, "),
    ],
)
def test_the_refusal_of_an_unknown_field_names_the_field_that_was_meant_or_the_valid_ones(
    task_type: int, values: dict[str, Any], advice: str
) -> None:
    assert advice in refusal(task_type, values).message


def test_the_refusal_proposes_no_field_that_the_caller_knows_by_another_name() -> None:
    with pytest.raises(PomeloError) as caught:
        build_task("m", TEXT, {"maxTokens": 5}, renamed=True)
    assert caught.value.message == "Unknown field for text models: maxTokens. Leave it out"


@pytest.mark.parametrize(
    ("task_type", "values", "expected"),
    [
        (TEXT, {"max_tokens": "100"}, "max_tokens: must be a whole number from 1, not text"),
        (TEXT, {"max_tokens": 1.5}, "max_tokens: must be a whole number from 1"),
        (TEXT, {"max_tokens": 2**63}, "must be a whole number from 1 to 9,223,372,036,854,775,807"),
        (TEXT, {"temperature": "0.7"}, "temperature: must be a number from 0 to 2, not text"),
        (TEXT, {"temperature": 10**400}, "temperature: must be a number from 0 to 2"),
        (IMAGE, {"width": 100.5}, "width: must be a whole number from 64 to 2,048"),
        (IMAGE, {"width": 2**31}, "width: must be a whole number from 64 to 2,048"),
        (
            TTS,
            {"voice_settings": {"style": "1"}},
            "voice_settings.style: must be a number from 0 to 1, not text",
        ),
    ],
)
def test_the_refusal_of_a_number_names_its_range(
    task_type: int, values: dict[str, Any], expected: str
) -> None:
    assert refusal(task_type, values).message.endswith(expected)


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
        (TEXT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (TEXT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        (TEXT, {"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo"),
        *[
            (TEXT, {"messages": [{"role": "user", "content": content}]}, f"messages[0].content{path}")
            for content, path in (
                (1, ""),
                ([1], "[0]"),
                ([{}], "[0].type"),
                ([{"type": {}}], "[0].type"),
                ([{"type": "text"}], "[0].text"),
                ([{"type": "text", "text": "x", "a": 1}], "[0].a"),
                ([{"type": "image_url", "image_url": {}}], "[0].image_url.url"),
                *[
                    (
                        [{"type": "image_url", "image_url": {"url": "data:", name: "high"}}],
                        f"[0].image_url.{name}",
                    )
                    for name in ("details", "URL", "x")
                ],
            )
        ],
        (IMAGE, {"width": 2**31}, "width"),
        (IMAGE, {"width": None, "prompt": ["x"]}, "prompt"),
        (IMAGE, {"output_format": "gif"}, "output_format"),
        (IMAGE, {"output_format": []}, "output_format"),
        (IMAGE, {"response_format": "both"}, "response_format"),
        *[(TTS, {name: ""}, name) for name in ("output_format", "language_code")],
        (STT, {"language_code": ""}, "language_code"),
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


@pytest.mark.parametrize(("length", "shown"), [(100, "x" * 100), (101, "x" * 100 + "…")])
def test_the_name_of_an_unknown_field_is_shown_up_to_100_characters(length: int, shown: str) -> None:
    assert refusal(TEXT, {"x" * length: 1}).field == shown


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
