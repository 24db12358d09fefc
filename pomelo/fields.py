"""The rules of every task type's input fields: type, range, length, choices and default; and their checks.

The table is plain data, which validation and the OpenAPI description read, and the documentation must equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from pomelo.audio_formats import AUDIO_FORMATS, DEFAULT_AUDIO_FORMAT
from pomelo.catalog.voice_names import MAX_LENGTH as MAX_VOICE_CHARACTERS
from pomelo.errors import PomeloError, invalid, missing

MAX_MESSAGES = 10_000
MAX_PARTS = 100
"""Parts of one message."""

MAX_TOTAL_PARTS = 10_000
"""Parts of all messages: checking one part costs as much as checking a short message."""

MAX_STOPS = 4
MAX_USER_CHARACTERS = 256
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
"""Characters of a key of metadata."""

MAX_METADATA_VALUE = 512
"""Characters of a value of metadata."""

MAX_TOOLS = 128
MAX_CALL_CHARACTERS = 256
"""Characters of the id of a tool call, and of the name of its tool."""

MAX_SCHEMA_CHARACTERS = 100_000
"""Characters of one JSON schema."""

MAX_SCHEMAS_CHARACTERS = 1_000_000
"""Characters of the JSON schemas of all tools together."""

JSON_OBJECT = "a JSON object"
"""What a JSON schema must be."""

SPEECH_FORMAT = "a documented format, such as mp3_44100_128 or pcm_16000"
"""What the output_format of speech must be."""

LANGUAGE = "an ISO 639 code, such as en, eng or haw, or a language tag, such as en-US"
"""What a language_code must be."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

MAX_SEED = 2**53 - 1
MAX_SPEECH_SEED = 2**32 - 1
MIN_SIDE, MAX_SIDE = 64, 2048

DEFAULT_IMAGE_SIDE = 1024
"""The width and height of an image in pixels if the caller does not set them."""

MAX_SPEAKERS = 32
MANY_WORDS = 5_000
"""Words of a transcript, or characters with times, above which it is processed in a thread: that takes 10 ms
and more."""

MAX_CHARACTERS = 10_000
"""Characters of a prompt or of a text to speak with the built-in models. A model's own limit applies."""


@dataclass(frozen=True, slots=True)
class FieldRule:
    """The valid values of one field.

    `type` is its JSON type. `minimum` and `maximum` are inclusive. A required field must not be empty.
    `fields` are those of an object. `default` is None if the model or the provider decides.
    """

    type: str
    required: bool = False
    minimum: float | None = None
    maximum: float | None = None
    max_length: int | None = None
    max_items: int | None = None
    choices: tuple[str, ...] = ()
    default: Any = None
    fields: Mapping[str, FieldRule] | None = None


Rules = Mapping[str, FieldRule]
"""Field name -> its rule."""

_SHARE = FieldRule("number", minimum=0, maximum=1)
_SIDE = FieldRule("integer", minimum=MIN_SIDE, maximum=MAX_SIDE, default=DEFAULT_IMAGE_SIDE)
_SEED = FieldRule("integer", minimum=0, maximum=MAX_SEED)
_PENALTY = FieldRule("number", minimum=-2, maximum=2)
_STRING = FieldRule("string")
CHARACTERS = FieldRule("string", required=True, max_length=MAX_CHARACTERS)
"""The rule of a text whose length the limits of the model bound."""

_RESPONSE_FORMAT = FieldRule("string", choices=("url", "b64_json"))
_METADATA = FieldRule("object", max_items=MAX_METADATA_PAIRS)

TEXT_FIELDS: Rules = {
    "messages": FieldRule("array", required=True, max_items=MAX_MESSAGES),
    "max_tokens": FieldRule("integer", minimum=1),
    "temperature": FieldRule("number", minimum=0, maximum=2),
    "top_p": _SHARE,
    "stop": FieldRule("array", max_items=MAX_STOPS),
    "seed": _SEED,
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "tools": FieldRule("array", max_items=MAX_TOOLS),
    "tool_choice": FieldRule("object"),
    "parallel_tool_calls": FieldRule("boolean"),
    "response_format": FieldRule("object"),
    "reasoning_effort": FieldRule(
        "string", choices=("none", "minimal", "low", "medium", "high", "xhigh", "max")
    ),
    "user": FieldRule("string", max_length=MAX_USER_CHARACTERS),
    "metadata": _METADATA,
}

IMAGE_FIELDS: Rules = {
    "prompt": CHARACTERS,
    "width": _SIDE,
    "height": _SIDE,
    "num_inference_steps": FieldRule("integer", minimum=1, maximum=100),
    "guidance_scale": FieldRule("number", minimum=0, maximum=20),
    "seed": _SEED,
    "output_format": FieldRule("string", choices=("png", "jpeg", "webp"), default="png"),
    "response_format": _RESPONSE_FORMAT,
    "metadata": _METADATA,
}

VOICE_SETTINGS_FIELDS: Rules = {
    "stability": _SHARE,
    "similarity_boost": _SHARE,
    "style": _SHARE,
    "use_speaker_boost": FieldRule("boolean"),
    "speed": FieldRule("number", minimum=0.25, maximum=4),
}

SPEECH_FIELDS: Rules = {
    "voice": FieldRule("string", required=True, max_length=MAX_VOICE_CHARACTERS),
    "voice_settings": FieldRule("object", fields=VOICE_SETTINGS_FIELDS),
    "output_format": FieldRule("string", choices=tuple(sorted(AUDIO_FORMATS)), default=DEFAULT_AUDIO_FORMAT),
    "seed": FieldRule("integer", minimum=0, maximum=MAX_SPEECH_SEED),
    "response_format": _RESPONSE_FORMAT,
    "metadata": _METADATA,
}
"""The fields that text-to-speech and speech-to-speech share."""

TEXT_TO_SPEECH_FIELDS: Rules = {"text": CHARACTERS, **SPEECH_FIELDS, "language_code": _STRING}

SPEECH_TO_SPEECH_FIELDS: Rules = {"audio": FieldRule("string", required=True), **SPEECH_FIELDS}

SPEECH_TO_TEXT_FIELDS: Rules = {
    "audio": FieldRule("string", required=True),
    "language_code": _STRING,
    "diarize": FieldRule("boolean", default=False),
    "num_speakers": FieldRule("integer", minimum=1, maximum=MAX_SPEAKERS),
    "timestamps": FieldRule("string", choices=("none", "word", "character"), default="word"),
    "metadata": _METADATA,
}


def invalid_number(label: str, rule: FieldRule, *, is_text: bool = False) -> PomeloError:
    """Returns the error for a number that breaks its rule, or that is a text although it must be a number."""
    expected = "a whole number" if rule.type == "integer" else "a number"
    if rule.minimum is not None:
        expected += f" from {rule.minimum:,}"
        if rule.maximum is not None:
            expected += f" to {rule.maximum:,}"
    if is_text:
        expected += ", not text"
    return invalid(label, expected, minimum=rule.minimum, maximum=rule.maximum)


def check_numbers(message: Any, rules: Rules, prefix: str = "") -> None:
    """Refuses optional numbers of `message` that are out of range or NaN, in the order of `rules`. Error
    messages name the field with `prefix` before it.

    Raises:
        PomeloError: invalid_parameter.
    """
    for field, rule in rules.items():
        if rule.minimum is None or not message.HasField(field):
            continue
        maximum = inf if rule.maximum is None else rule.maximum
        if not rule.minimum <= getattr(message, field) <= maximum:
            raise invalid_number(prefix + field, rule)


def check_enum(message: Any, field: str, enum: Any) -> None:
    """Refuses an unknown value of an enum field: proto3 accepts any number.

    Raises:
        PomeloError: invalid_parameter.
    """
    value = getattr(message, field)
    if value and value not in enum.values():
        raise invalid(field, f"one of {', '.join(enum.keys()[1:])}")


def check_name(name: str, label: str) -> None:
    """Refuses a name that is not an identifier, as vendors take them. The error names `label`.

    Raises:
        PomeloError: invalid_parameter.
    """
    if not _NAME.fullmatch(name):
        raise invalid(label, "1 to 64 of the characters A-Z, a-z, 0-9, _ and -")


def check_required_text(message: Any, field: str, max_length: int) -> None:
    """Refuses a text that is empty or has more than `max_length` characters.

    Raises:
        PomeloError: missing_parameter, context_length_exceeded.
    """
    text = getattr(message, field)
    if not text:
        raise missing(field)
    if len(text) > max_length:
        raise PomeloError(
            "context_length_exceeded",
            f"{field} is longer than the {max_length:,} characters that the model takes. Shorten it",
            field=field,
            values={"maxCharacters": max_length},
        )
