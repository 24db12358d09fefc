"""Every input field has a rule, and every documented range, length and choice holds to its ends."""

from __future__ import annotations

from math import inf, nan, nextafter
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from gateway.types import TASK_FORMATS
from pomelo.errors import PomeloError
from pomelo.fields import MAX_CHARACTERS, VOICE_SETTINGS_FIELDS, FieldRule, Rules
from pomelo.gen.v1 import image_pb2, speech_pb2
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.tasks.labels import check_labels
from tests.unit.tasks.collectors import BODIES, MODELS, definition_of, refusal, task_input

TEXT, IMAGE, TTS, STS, STT = BODIES
"""A model of every task type."""

RULES: dict[str, Rules] = {model: TASK_FORMATS[MODELS[model].task_type].rules for model in BODIES}
EACH_TYPE = pytest.mark.parametrize("model", RULES)
SEED, SPEECH_SEED = 2**53 - 1, 2**32 - 1
VOICE_RANGES: list[tuple[str, float, float]] = [
    *[("stability", 0, 1), ("similarity_boost", 0, 1), ("style", 0, 1), ("speed", 0.25, 4)]
]
RANGES: list[tuple[str, str, float, float]] = [
    (TEXT, "max_tokens", 1, 2**31 - 1),
    (TEXT, "temperature", 0, 2),
    (TEXT, "top_p", 0, 1),
    (TEXT, "seed", 0, SEED),
    (TEXT, "presence_penalty", -2, 2),
    (TEXT, "frequency_penalty", -2, 2),
    (IMAGE, "width", 64, 2048),
    (IMAGE, "height", 64, 2048),
    (IMAGE, "num_inference_steps", 1, 100),
    (IMAGE, "guidance_scale", 0, 20),
    (IMAGE, "seed", 0, SEED),
    (TTS, "seed", 0, SPEECH_SEED),
    (STS, "seed", 0, SPEECH_SEED),
    (STT, "num_speakers", 1, 32),
    *[
        (model, f"voice_settings.{name}", low, high)
        for model in (TTS, STS)
        for name, low, high in VOICE_RANGES
    ],
]
LENGTHS = [
    (TEXT, "messages", 10_000, "invalid_parameter"),
    (TEXT, "stop", 4, "invalid_parameter"),
    (TEXT, "tools", 128, "invalid_parameter"),
    (TEXT, "user", 256, "invalid_parameter"),
    *[(model, "metadata", 16, "invalid_parameter") for model in BODIES],
    (IMAGE, "prompt", 10_000, "context_length_exceeded"),
    (TTS, "text", 10_000, "context_length_exceeded"),
    (TTS, "voice", 64, "invalid_parameter"),
    (STS, "voice", 64, "invalid_parameter"),
]
REQUIRED = {
    *[(TEXT, "messages"), (IMAGE, "prompt"), (TTS, "text"), (TTS, "voice")],
    *[(STS, "audio"), (STS, "voice"), (STT, "audio")],
}


def rule_of(model: str, field: str) -> FieldRule:
    above, _, name = field.rpartition(".")
    return (VOICE_SETTINGS_FIELDS if above else RULES[model])[name]


def input_descriptor(model: str) -> Descriptor:
    message = TaskSpec.DESCRIPTOR.fields_by_name[definition_of(model).name].message_type
    assert message is not None
    return message


def refusal_of(model: str, field: str, value: float) -> str:
    """What a task with this value in a numeric field is refused for."""
    given = task_input(model)
    above, _, name = field.rpartition(".")
    setattr(getattr(given, above) if above else given, name, value)
    return refusal(model, given)


def refusal_of_labels(**labels: Any) -> str:
    """What a task with this id of the end user, or this metadata, is refused for."""
    try:
        check_labels(TaskSpec(**labels))
    except PomeloError as error:
        return f"{error.code} {error.field}"
    return ""


@EACH_TYPE
def test_every_field_of_an_input_and_of_a_rest_body_has_a_rule(model: str) -> None:
    # In a message, the user and metadata are part of the TaskSpec; response_format is TaskOptions.delivery, or the
    # format of a text.
    of_body = {TEXT: {"user", "response_format"}, STT: set()}.get(model, {"response_format"}) | {"metadata"}
    of_message = {field.name for field in input_descriptor(model).fields} - {"format"}
    assert set(RULES[model]) == of_message | of_body
    assert set(VOICE_SETTINGS_FIELDS) == {field.name for field in speech_pb2.VoiceSettings.DESCRIPTOR.fields}


def test_every_number_of_the_rules_is_in_the_tables() -> None:
    rules = {(model, name): rule for model, fields in RULES.items() for name, rule in fields.items()}
    numbers = {key for key, rule in rules.items() if rule.minimum is not None}
    voice = {
        f"voice_settings.{name}" for name, rule in VOICE_SETTINGS_FIELDS.items() if rule.minimum is not None
    }
    assert {(model, field) for model, field, _, _ in RANGES} == numbers | {
        (model, field) for model in (TTS, STS) for field in voice
    }
    lengths = {key: rule.max_length or rule.max_items for key, rule in rules.items()}
    limited = {key: length for key, length in lengths.items() if length}
    assert limited == {(model, field): length for model, field, length, _ in LENGTHS}
    assert {key for key, rule in rules.items() if rule.required} == REQUIRED


@pytest.mark.parametrize(("model", "field", "minimum", "maximum"), RANGES)
def test_a_number_is_accepted_at_the_ends_of_its_range_and_refused_beyond(
    model: str, field: str, minimum: float, maximum: float
) -> None:
    assert rule_of(model, field).minimum == minimum
    assert rule_of(model, field).maximum == (None if field == "max_tokens" else maximum)
    for value in (minimum, maximum):
        assert refusal_of(model, field, value) == ""
    if rule_of(model, field).type == "integer":
        beyond = [minimum - 1] + ([maximum + 1] if field != "max_tokens" else [])
    else:
        beyond = [
            nextafter(minimum, -inf),
            nextafter(maximum, inf),
            minimum - 0.001,
            maximum + 0.001,
            nan,
            inf,
        ]
    for value in beyond:
        assert refusal_of(model, field, value) == f"invalid_parameter {field}"


@EACH_TYPE
def test_a_required_field_must_not_be_empty(model: str) -> None:
    for field in input_descriptor(model).fields:
        name, given = field.name, task_input(model)
        given.ClearField(name)
        assert refusal(model, given) == (f"missing_parameter {name}" if (model, name) in REQUIRED else "")


@pytest.mark.parametrize(("model", "field", "length", "code"), LENGTHS)
def test_a_text_or_a_list_has_at_most_its_maximum_length(
    model: str, field: str, length: int, code: str
) -> None:
    for count, refused in ((length, ""), (length + 1, f"{code} {field}")):
        value: Any = "ß" * count
        if field in ("messages", "stop"):
            value = [BODIES[TEXT]["messages"][0] if field == "messages" else "x"] * count
        if field == "user":
            assert refusal_of_labels(user=value) == refused
        elif field == "metadata":
            assert refusal_of_labels(metadata={str(key): "" for key in range(count)}) == refused
        elif field == "tools":
            tools = [{"type": "function", "function": {"name": str(index)}} for index in range(count)]
            assert refusal(model, task_input(model, tools=tools)) == refused
        else:
            assert refusal(model, task_input(model, **{field: value})) == refused


def test_no_stop_sequence_is_empty() -> None:
    assert refusal(TEXT, task_input(TEXT, stop=["a", ""])) == "invalid_parameter stop"


def test_built_in_models_take_the_documented_number_of_characters() -> None:
    for example in (IMAGE, TTS):
        models = [model for model in MODELS.values() if model.task_type == MODELS[example].task_type]
        assert {model.limits.max_characters for model in models} == {MAX_CHARACTERS} == {10_000}


@EACH_TYPE
def test_choices_of_enums_are_their_values(model: str) -> None:
    for field in input_descriptor(model).fields:
        if field.enum_type is not None:
            unspecified, *names = [value.name for value in field.enum_type.values]
            prefix = unspecified.removesuffix("UNSPECIFIED")
            values = [name.removeprefix(prefix).lower() for name in names]
            assert list(RULES[model][field.name].choices) == values


@pytest.mark.parametrize("model", [IMAGE, TTS, STS])
def test_every_delivery_but_both_is_a_response_format(model: str) -> None:
    assert MediaDelivery.keys() == [
        f"MEDIA_DELIVERY_{name}" for name in ("UNSPECIFIED", "LINK", "INLINE", "BOTH")
    ]
    # In JSON, an absent response_format means both.
    assert RULES[model]["response_format"].choices == ("url", "b64_json")


@pytest.mark.parametrize(
    ("model", "field", "values"),
    [
        (IMAGE, "output_format", image_pb2.ImageFormat.values()),
        (STT, "timestamps", speech_pb2.TimestampGranularity.values()),
    ],
)
def test_an_enum_has_one_of_its_values(model: str, field: str, values: list[int]) -> None:
    for value in values:
        assert refusal_of(model, field, value) == ""
    assert refusal_of(model, field, 99) == f"invalid_parameter {field}"


@pytest.mark.parametrize("model", [TTS, STS])
def test_every_listed_audio_format_is_accepted_and_no_other(model: str) -> None:
    for choice in RULES[model]["output_format"].choices:
        assert refusal(model, task_input(model, output_format=choice)) == ""
    for other in ("mp3_1_1", "mp3_44100_33", "flac"):
        assert refusal(model, task_input(model, output_format=other)) == "invalid_parameter output_format"
