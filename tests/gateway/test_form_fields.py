"""The texts of a form as the fields of a task."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.parsing.task import build_task
from tests.gateway.fields import HI, STT, TEXT, TTS, build, refusal


def test_form_fields_equal_the_same_json_values() -> None:
    texts = {
        "messages": '[{"role":"user","content":"Hi"}]',
        "max_tokens": "100",
        "temperature": "0.7",
        "stop": '["a","b"]',
        "user": "42",
    }
    values = {"messages": HI, "max_tokens": 100, "temperature": 0.7, "stop": ["a", "b"], "user": "42"}
    assert build(TEXT, texts, form=True) == build(TEXT, values)
    assert list(build(TEXT, {"stop": "[END]"}, form=True).text.stop) == ["[END]"]
    assert build_task("m", TEXT, {"stream": "True"}, form=True).stream is True
    assert build(STT, {"diarize": "true"}, form=True).speech_to_text.diarize
    settings = build(TTS, {"voice_settings": '{"stability": 0.5}'}, form=True).text_to_speech.voice_settings
    assert settings.stability == 0.5


@pytest.mark.parametrize(
    ("task_type", "texts", "field"),
    [
        (TEXT, {"max_tokens": ""}, "max_tokens"),
        (TEXT, {"max_tokens": "ten"}, "max_tokens"),
        (TEXT, {"max_tokens": "9" * 5000}, "max_tokens"),
        (TEXT, {"temperature": "NaN"}, "temperature"),
        (TEXT, {"messages": "Hi"}, "messages"),
        (TEXT, {"stream": "1"}, "stream"),
        (STT, {"diarize": "on"}, "diarize"),
        (TTS, {"voice_settings": "{"}, "voice_settings"),
        (TEXT, {"messages": '[{"role":"user","content":"\\ud83d"}]'}, "messages"),
        (TEXT, {"stop": '["\\ud83d"]'}, "stop"),
        (TEXT, {"stop": '["a"'}, "stop"),
    ],
)
def test_an_invalid_form_value_is_refused(task_type: int, texts: dict[str, Any], field: str) -> None:
    assert refusal(task_type, texts, form=True).field == field


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        *[("[]", []), ('["a"]', ["a"]), ("[a]", ["[a]"]), ("a", ["a"]), ("[", ["["])],
        *[('[ "a" ]', ["a"]), ('\n[\n  "a"]\n', ["a"]), ("[ ]", []), ("[ a ]", ["[ a ]"]), (" ", [" "])],
    ],
)
def test_stop_in_a_form_is_a_list_only_if_written_as_one(text: str, stop: list[str]) -> None:
    assert list(build(TEXT, {"stop": text}, form=True).text.stop) == stop


def test_white_space_around_a_form_value_that_is_no_text_is_ignored() -> None:
    tools = '[{"type":"function","function":{"name":"f"}}]'
    choice = '\n{"type": "function", "function": {"name": "f"}}\n'
    texts = {
        "messages": '[{"role":"user","content":"Hi"}]',
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": "true\n",
    }
    text = build(TEXT, {**texts, "logprobs": " False", "n": " 1 "}, form=True).text
    assert (text.tool_choice.tool, text.parallel_tool_calls) == ("f", True)
    assert build(STT, {"diarize": " True "}, form=True).speech_to_text.diarize
    assert build_task("m", TEXT, {"stream": " true\n"}, form=True).stream is True


@pytest.mark.parametrize("null", ["null", " null\n"])
def test_null_in_a_form_leaves_out_a_field_that_is_no_text(null: str) -> None:
    names = [
        *("max_tokens", "temperature", "seed", "tools", "tool_choice", "parallel_tool_calls", "metadata"),
        *("response_format", "n", "logprobs", "top_logprobs", "logit_bias", "stream"),
    ]
    texts = {"messages": '[{"role":"user","content":"Hi"}]', **dict.fromkeys(names, null)}
    assert build(TEXT, texts, form=True) == build(TEXT, {"messages": HI})
    speech = {"text": "Hi", "voice": "adam"}
    assert build(TTS, {**speech, "voice_settings": null}, form=True) == build(TTS, speech)
    assert not build_task("m", TEXT, {"stream": null}, form=True).stream


def test_null_in_a_form_is_a_text_for_a_field_of_text() -> None:
    spec = build(TEXT, {"user": "null", "stop": "null"}, form=True)
    assert (spec.user, list(spec.text.stop)) == ("null", ["null"])
    assert refusal(STT, {"timestamps": "null"}, form=True).field == "timestamps"
