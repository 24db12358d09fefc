"""The table of field rules describes every input field, and validation follows it."""

from __future__ import annotations

from math import inf, nan, nextafter
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from pomelo.catalog.catalog import Catalog
from pomelo.errors import PomeloError
from pomelo.fields import FIELD_RULES, MAX_CHARACTERS, VOICE_SETTINGS_FIELDS, FieldRule
from pomelo.gen.v1 import image_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import Task, TaskType
from pomelo.tasks import TASK_TYPES

TEXT, IMAGE = TaskType.TASK_TYPE_TEXT, TaskType.TASK_TYPE_IMAGE
TEXT_TO_SPEECH, SPEECH_TO_TEXT = TaskType.TASK_TYPE_TEXT_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_TEXT
SPEECH_TO_SPEECH = TaskType.TASK_TYPE_SPEECH_TO_SPEECH
MODELS = {model.task_type: model for model in Catalog.load().models.values()}
AUDIO = speech_pb2.AudioInput(media_id="media_1")
VALID_INPUTS: dict[int, Any] = {
    TEXT: text_pb2.TextInput(messages=[text_pb2.Message(role=text_pb2.ROLE_USER, content="Hi")]),
    IMAGE: image_pb2.ImageInput(prompt="a lake"),
    TEXT_TO_SPEECH: speech_pb2.TextToSpeechInput(text="Hi", voice="adam"),
    SPEECH_TO_SPEECH: speech_pb2.SpeechToSpeechInput(audio=AUDIO, voice="adam"),
    SPEECH_TO_TEXT: speech_pb2.SpeechToTextInput(audio=AUDIO),
}
NUMBERS = [
    (task_type, prefix, name, rule)
    for task_type, rules in FIELD_RULES.items()
    for prefix, fields in (("", rules), ("voice_settings.", VOICE_SETTINGS_FIELDS))
    if not prefix or "voice_settings" in rules
    for name, rule in fields.items()
    if rule.minimum is not None
]


def input_descriptor(task_type: TaskType.ValueType) -> Descriptor:
    """The message of a task type's input."""
    message = Task.DESCRIPTOR.fields_by_name[TASK_TYPES[task_type].name].message_type
    assert message is not None
    return message


def valid_input(task_type: int) -> Any:
    """A copy of a valid input."""
    task_input = type(VALID_INPUTS[task_type])()
    task_input.CopyFrom(VALID_INPUTS[task_type])
    return task_input


def refused_field(task_type: TaskType.ValueType, task_input: Any) -> str:
    """The field that validation refuses; empty if it accepts the input."""
    try:
        TASK_TYPES[task_type].check(task_input, MODELS[task_type])
    except PomeloError as error:
        return error.field or ""
    return ""


@pytest.mark.parametrize("task_type", FIELD_RULES)
def test_every_input_field_has_a_rule(task_type: TaskType.ValueType) -> None:
    assert set(FIELD_RULES[task_type]) == {field.name for field in input_descriptor(task_type).fields}
    assert set(VOICE_SETTINGS_FIELDS) == {field.name for field in speech_pb2.VoiceSettings.DESCRIPTOR.fields}


@pytest.mark.parametrize(("task_type", "prefix", "name", "rule"), NUMBERS)
def test_a_number_is_accepted_in_its_range_and_refused_outside(
    task_type: TaskType.ValueType, prefix: str, name: str, rule: FieldRule
) -> None:
    def refused(value: float) -> str:
        task_input = valid_input(task_type)
        setattr(task_input.voice_settings if prefix else task_input, name, value)
        return refused_field(task_type, task_input)

    assert rule.minimum is not None
    integer = rule.type == "integer"
    assert refused(rule.minimum) == ""
    assert refused(rule.minimum - 1 if integer else nextafter(rule.minimum, -inf)) == prefix + name
    if rule.maximum is not None:
        assert refused(rule.maximum) == ""
        assert refused(rule.maximum + 1 if integer else nextafter(rule.maximum, inf)) == prefix + name
    if not integer:
        assert refused(nan) == prefix + name


@pytest.mark.parametrize("task_type", FIELD_RULES)
def test_a_required_field_must_not_be_empty(task_type: TaskType.ValueType) -> None:
    for name, rule in FIELD_RULES[task_type].items():
        task_input = valid_input(task_type)
        task_input.ClearField(name)
        assert refused_field(task_type, task_input) == (name if rule.required else "")


@pytest.mark.parametrize("task_type", FIELD_RULES)
def test_a_text_or_a_list_has_at_most_its_maximum_length(task_type: TaskType.ValueType) -> None:
    for name, rule in FIELD_RULES[task_type].items():
        if rule.max_length is not None:
            values: list[Any] = ["x" * rule.max_length, "x" * (rule.max_length + 1)]
        elif rule.max_items is not None:
            item = "x" if name == "stop" else VALID_INPUTS[TEXT].messages[0]
            values = [[item] * rule.max_items, [item] * (rule.max_items + 1)]
        else:
            continue
        for value, refused in zip(values, ("", name), strict=True):
            task_input = valid_input(task_type)
            task_input.ClearField(name)
            task_input.MergeFrom(type(task_input)(**{name: value}))
            assert refused_field(task_type, task_input) == refused, name


@pytest.mark.parametrize("task_type", [IMAGE, TEXT_TO_SPEECH])
def test_built_in_models_take_the_documented_number_of_characters(task_type: TaskType.ValueType) -> None:
    models = [model for model in Catalog.load().models.values() if model.task_type == task_type]
    assert {model.limits.max_characters for model in models} == {MAX_CHARACTERS}


@pytest.mark.parametrize("task_type", FIELD_RULES)
def test_choices_of_enums_are_their_values(task_type: TaskType.ValueType) -> None:
    for field in input_descriptor(task_type).fields:
        if field.enum_type is not None:
            unspecified, *names = [value.name for value in field.enum_type.values]
            prefix = unspecified.removesuffix("UNSPECIFIED")
            values = [name.removeprefix(prefix).lower() for name in names]
            # In JSON, an absent response_format means both.
            assert list(FIELD_RULES[task_type][field.name].choices) == [v for v in values if v != "both"]


def test_every_listed_audio_format_is_accepted_and_no_other() -> None:
    for task_type in (TEXT_TO_SPEECH, SPEECH_TO_SPEECH):
        task_input = valid_input(task_type)
        for choice in FIELD_RULES[task_type]["output_format"].choices:
            task_input.output_format = choice
            assert refused_field(task_type, task_input) == ""
        task_input.output_format = "mp3_1_1"
        assert refused_field(task_type, task_input) == "output_format"
