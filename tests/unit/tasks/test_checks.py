"""Every documented range and length: its ends are accepted, and what is just beyond them is refused by name."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog, Limits, Model
from pomelo.catalog.pricing import Prices
from pomelo.errors import PomeloError
from pomelo.gen.v1 import image_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import Task, TaskType
from pomelo.tasks import TASK_TYPES
from tests.tasks import to_task

MODELS = Catalog.load().models
PIXEL = "data:image/png;base64,iVBORw0KGgo="
REQUIRED: dict[str, dict[str, Any]] = {
    "gpt-4": {"messages": [{"role": "user", "content": "Hi"}]},
    "flux-1-pro": {"prompt": "A kite"},
    "eleven-labs-tts": {"text": "Hi", "voice": "adam"},
    "eleven-labs-sts": {"audio": "AAAA", "voice": "adam"},
    "eleven-labs-stt": {"audio": "AAAA"},
}
SEED = 2**53 - 1
RANGES: list[tuple[str, str, float, float, float]] = [
    ("gpt-4", "temperature", 0, 2, 0.001),
    ("gpt-4", "top_p", 0, 1, 0.001),
    ("gpt-4", "seed", 0, SEED, 1),
    ("gpt-4", "presence_penalty", -2, 2, 0.001),
    ("gpt-4", "frequency_penalty", -2, 2, 0.001),
    ("gpt-4", "max_tokens", 1, 2**31 - 1, 1),
    ("flux-1-pro", "width", 64, 2048, 1),
    ("flux-1-pro", "height", 64, 2048, 1),
    ("flux-1-pro", "num_inference_steps", 1, 100, 1),
    ("flux-1-pro", "guidance_scale", 0, 20, 0.001),
    ("flux-1-pro", "seed", 0, SEED, 1),
    ("eleven-labs-tts", "seed", 0, 2**32 - 1, 1),
    ("eleven-labs-sts", "seed", 0, 2**32 - 1, 1),
    ("eleven-labs-stt", "num_speakers", 1, 32, 1),
    *[
        (model, f"voice_settings.{field}", minimum, maximum, 0.001)
        for model in ("eleven-labs-tts", "eleven-labs-sts")
        for field, minimum, maximum in (
            ("stability", 0, 1),
            ("similarity_boost", 0, 1),
            ("style", 0, 1),
            ("speed", 0.25, 4),
        )
    ],
]


def check(task: Task, model: Model | None = None) -> str:
    """The code and the field of what a task is refused for; `ok` if it is not."""
    model = model or MODELS[task.model]
    task_type = TASK_TYPES[model.task_type]
    try:
        task_type.check(getattr(task, task_type.name), model)
    except PomeloError as error:
        return f"{error.code} {error.field}"
    return "ok"


def task(model: str, **fields: Any) -> Task:
    """A task with its required fields, and others of the REST body."""
    return to_task({"model": model, **REQUIRED[model], **fields})


def with_value(model: str, field: str, value: float) -> Task:
    """Returns a task with a value in one numeric field."""
    result = task(model)
    message: Any = getattr(result, TASK_TYPES[MODELS[model].task_type].name)
    *above, name = field.split(".")
    for part in above:
        message = getattr(message, part)
    setattr(message, name, value)
    return result


@pytest.mark.parametrize(("model", "field", "minimum", "maximum", "step"), RANGES)
def test_a_number_is_accepted_at_the_bounds_of_its_range_and_refused_beyond(
    model: str, field: str, minimum: float, maximum: float, step: float
) -> None:
    for value in (minimum, maximum):
        assert check(with_value(model, field, value)) == "ok"
    beyond = [minimum - step, maximum + step] if maximum < 2**31 - 1 or field == "seed" else [minimum - step]
    for value in beyond + ([nan, inf] if step < 1 else []):
        assert check(with_value(model, field, value)) == f"invalid_parameter {field}"


@pytest.mark.parametrize(
    ("model", "field", "missing"),
    [
        ("gpt-4", "messages", []),
        ("flux-1-pro", "prompt", ""),
        ("eleven-labs-tts", "text", ""),
        ("eleven-labs-tts", "voice", ""),
        ("eleven-labs-sts", "audio", ""),
        ("eleven-labs-sts", "voice", ""),
        ("eleven-labs-stt", "audio", ""),
    ],
)
def test_a_required_field_must_be_there(model: str, field: str, missing: Any) -> None:
    assert check(task(model, **{field: missing})) == f"missing_parameter {field}"


@pytest.mark.parametrize(("model", "field"), [("flux-1-pro", "prompt"), ("eleven-labs-tts", "text")])
def test_a_text_may_have_exactly_the_characters_that_the_model_takes(model: str, field: str) -> None:
    maximum = MODELS[model].limits.max_characters
    assert check(task(model, **{field: "ß" * maximum})) == "ok"
    assert check(task(model, **{field: "ß" * (maximum + 1)})) == f"context_length_exceeded {field}"


def test_a_conversation_may_have_exactly_the_words_that_the_model_takes() -> None:
    model = Model("m", TaskType.TASK_TYPE_TEXT, (), Limits(max_input_tokens=100), Prices(), "")
    for words, code in ((100, "ok"), (101, "context_length_exceeded messages")):
        whole = [{"role": "user", "content": "word " * words}]
        parted = [{"role": "user", "content": [{"type": "text", "text": "word " * words}]}]
        for messages in (whole, parted):
            assert check(task("gpt-4", messages=messages), model) == code
    # Long words are fewer than characters, and so are tokens.
    assert check(task("gpt-4", messages=[{"role": "user", "content": "x" * 1_000}]), model) == "ok"


@pytest.mark.parametrize(
    ("field", "maximum", "bad"),
    [("stop", ["a"] * 4, (["a"] * 5, ["a", ""])), ("user", "u" * 256, ("u" * 257,))],
)
def test_lists_and_names_have_a_length(field: str, maximum: Any, bad: tuple[Any, ...]) -> None:
    assert check(task("gpt-4", **{field: maximum})) == "ok"
    for value in bad:
        assert check(task("gpt-4", **{field: value})) == f"invalid_parameter {field}"


def test_a_conversation_has_at_most_ten_thousand_messages_and_a_message_a_hundred_parts() -> None:
    message = {"role": "user", "content": "Hi"}
    assert check(task("gpt-4", messages=[message] * 10_000)) == "ok"
    assert check(task("gpt-4", messages=[message] * 10_001)) == "invalid_parameter messages"
    part = {"type": "text", "text": "Hi"}
    for count, found in ((100, "ok"), (101, "invalid_parameter messages[0].content")):
        assert check(task("gpt-4", messages=[{"role": "user", "content": [part] * count}])) == found
    assert check(task("gpt-4", messages=[{"role": "user", "content": []}])) == (
        "missing_parameter messages[0].content"
    )


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_only_a_users_message_has_images(role: str) -> None:
    for part, found in (
        ({"type": "text", "text": "Hi"}, "ok"),
        (
            {"type": "image_url", "image_url": {"url": PIXEL}},
            "ok" if role == "user" else "invalid_parameter messages[0].content[0]",
        ),
    ):
        assert check(task("gpt-4", messages=[{"role": role, "content": [part]}])) == found


@pytest.mark.parametrize(
    ("url", "accepted"),
    [
        (PIXEL, True),
        ("https://example.org/a.png", False),
        ("data:image/png;base64,PHN2Zz4=", False),
        ("data:text/plain;base64,iVBORw0KGgo=", True),  # the bytes decide
    ],
)
def test_an_image_is_embedded_and_known_by_its_bytes(url: str, accepted: bool) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    result = task("gpt-4", messages=[{"role": "user", "content": content}])
    assert (check(result) == "ok") == accepted
    if accepted:
        assert result.text.messages[0].parts.parts[0].image_url.url == PIXEL


def test_a_message_has_a_role_that_is_known() -> None:
    result = task("gpt-4")
    for role, found in ((0, "missing_parameter"), (99, "invalid_parameter")):
        result.text.messages[0].role = role  # type: ignore[assignment]
        assert check(result) == f"{found} messages[0].role"


@pytest.mark.parametrize(
    ("model", "field", "enum"),
    [
        ("flux-1-pro", "output_format", image_pb2.ImageFormat),
        ("flux-1-pro", "response_format", None),
        ("eleven-labs-tts", "response_format", None),
        ("eleven-labs-sts", "response_format", None),
        ("eleven-labs-stt", "timestamps", speech_pb2.Timestamps),
    ],
)
def test_an_enum_has_one_of_its_values(model: str, field: str, enum: Any) -> None:
    for value in enum.values() if enum else (0, 1):
        assert check(with_value(model, field, value)) == "ok"
    assert check(with_value(model, field, 99)) == f"invalid_parameter {field}"


@pytest.mark.parametrize(
    ("model", "field", "bad"),
    [
        ("eleven-labs-tts", "voice", "a" * 65),
        ("eleven-labs-tts", "output_format", "mp3_44100_33"),
        ("eleven-labs-sts", "output_format", "flac"),
        ("eleven-labs-tts", "language_code", "xx-nowhere-at-all"),
        ("eleven-labs-stt", "language_code", "not a language"),
    ],
)
def test_an_invalid_voice_format_or_language_is_refused(model: str, field: str, bad: str) -> None:
    assert check(task(model, **{field: bad})) == f"invalid_parameter {field}"


def test_a_part_without_content_is_refused() -> None:
    result = task("gpt-4")
    result.text.messages[0].parts.parts.append(text_pb2.ContentPart())
    assert check(result) == "invalid_parameter messages[0].content[0]"
