"""Inputs that a task type refuses by name, besides the ranges and lengths of single fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pomelo.catalog.catalog import Limits
from pomelo.gen.v1 import text_pb2
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.tasks import text
from tests.unit.refusals import refused
from tests.unit.tasks.collectors import MODELS, PIXEL, definition_of, no_files, refusal, task_input


def conversation(content: Any, role: str = "user") -> text_pb2.TextInput:
    given: text_pb2.TextInput = task_input("gpt-4", messages=[{"role": role, "content": content}])
    return given


def image_part(url: str = PIXEL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


TEXT_PART = {"type": "text", "text": "Hi"}


def test_a_conversation_may_have_exactly_the_words_that_the_model_takes() -> None:
    model = replace(MODELS["gpt-4"], limits=Limits(max_input_tokens=100))
    for content in ("word " * 100, "a " * 100, [{"type": "text", "text": "word " * 100}]):
        text.check(conversation(content), model, no_files)
    for content in ("word " * 101, "a " * 101, [{"type": "text", "text": "word " * 101}]):
        with refused("context_length_exceeded", "messages") as error:
            text.check(conversation(content), model, no_files)
        assert error.value.values == {"maxTokens": "100"}
    # Long words are fewer than characters, and so are tokens.
    text.check(conversation("x" * 1_000), model, no_files)


def halves(form: str, words: int) -> text_pb2.TextInput:
    """Returns a conversation with these words in each of two places."""
    said = "word " * words
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": f'{{"a": "{said}"}}'}}
    messages: dict[str, list[dict[str, Any]]] = {
        "parts": [{"role": "user", "content": [{"type": "text", "text": said}] * 2}],
        "messages": [{"role": role, "content": said} for role in ("system", "user")],
        "calls": [
            {"role": "user", "content": said},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "noon"},
        ],
        "results": [
            {"role": "user", "content": said},
            {"role": "assistant", "tool_calls": [call | {"function": {"name": "now", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": said},
        ],
    }
    given: text_pb2.TextInput = task_input("gpt-4", messages=messages[form])
    return given


@pytest.mark.parametrize("form", ["parts", "messages", "calls", "results"])
def test_the_words_of_a_conversation_are_counted_together(form: str) -> None:
    model = replace(MODELS["gpt-4"], limits=Limits(max_input_tokens=100))
    text.check(halves(form, 40), model, no_files)
    with refused("context_length_exceeded", "messages"):
        text.check(halves(form, 60), model, no_files)


@pytest.mark.parametrize(
    ("count", "found"),
    [(0, "missing_parameter messages[0].content"), (100, ""), (101, "invalid_parameter messages[0].content")],
)
def test_a_message_has_one_to_a_hundred_parts(count: int, found: str) -> None:
    assert refusal("gpt-4", conversation([TEXT_PART] * count)) == found


def test_a_part_without_content_is_refused() -> None:
    given = task_input("gpt-4")
    given.messages[0].content.insert(0, text_pb2.ContentPart())
    assert refusal("gpt-4", given) == "invalid_parameter messages[0].content[0]"


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_only_a_users_message_has_images(role: str) -> None:
    assert refusal("gpt-4", conversation([TEXT_PART], role)) == ""
    found = "" if role == "user" else "invalid_parameter messages[0].content[0]"
    assert refusal("gpt-4", conversation([image_part()], role)) == found


@pytest.mark.parametrize("url", [PIXEL, "data:text/plain;base64,iVBORw0KGgo="])
def test_an_image_is_known_by_its_bytes(url: str) -> None:
    given = conversation([image_part(url)])
    assert refusal("gpt-4", given) == ""
    assert given.messages[0].content[0].image.source.url == PIXEL


@pytest.mark.parametrize("url", ["https://example.org/a.png", "data:image/png;base64,PHN2Zz4="])
def test_an_image_that_is_not_embedded_or_of_another_format_is_refused(url: str) -> None:
    found = refusal("gpt-4", conversation([image_part(url)]))
    assert found == "invalid_parameter messages[0].content[0].image_url"


@pytest.mark.parametrize(("role", "code"), [(0, "missing_parameter"), (99, "invalid_parameter")])
def test_a_message_has_a_role_that_is_known(role: text_pb2.Role.ValueType, code: str) -> None:
    given = task_input("gpt-4")
    given.messages[0].role = role
    assert refusal("gpt-4", given) == f"{code} messages[0].role"


@pytest.mark.parametrize(
    ("model", "field", "bad"),
    [
        ("eleven-labs-tts", "language_code", "xx-nowhere-at-all"),
        ("eleven-labs-stt", "language_code", "not a language"),
    ],
)
def test_an_unknown_language_is_refused(model: str, field: str, bad: str) -> None:
    assert refusal(model, task_input(model, **{field: bad})) == f"invalid_parameter {field}"


@pytest.mark.parametrize("model", ["eleven-labs-sts", "eleven-labs-stt"])
def test_audio_has_bytes_or_is_an_upload(model: str) -> None:
    assert refusal(model, task_input(model, audio="")) == "missing_parameter audio"
    given = task_input(model)
    given.audio.CopyFrom(MediaSource(media_id="media_1"))
    assert refusal(model, given) == ""


@pytest.mark.parametrize("model", ["eleven-labs-sts", "eleven-labs-stt"])
def test_audio_at_a_url_is_refused(model: str) -> None:
    given = task_input(model)
    for url in ("https://example.org/a.mp3", "data:audio/mpeg;base64,SUQz"):
        given.audio.CopyFrom(MediaSource(url=url))
        with refused("invalid_parameter", "audio", match="bytes, or the media_id of an upload"):
            definition_of(model).check(given, MODELS[model], no_files)
    given.audio.CopyFrom(MediaSource(url=""))
    assert refusal(model, given) == "missing_parameter audio"


def test_the_settings_of_a_voice_have_their_ranges() -> None:
    for model in ("eleven-labs-tts", "eleven-labs-sts"):
        assert refusal(model, task_input(model, voice="adam", voice_settings={"speed": 1.1})) == ""
        wrong = task_input(model, voice="adam", voice_settings={"speed": 9})
        assert refusal(model, wrong) == "invalid_parameter voice_settings.speed"
