"""The fields of a task's body: their names, and how each one goes into its protobuf message.

One table a kind of task, built once. `body` walks it. Types are checked here; ranges, and what is
required, by the engine for both wires alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from jiter import from_json

from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1.image_pb2 import ImageFormat
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.speech_pb2 import Timestamps
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import ContentParts, Message, Role

Put = Callable[[Any, Any], None]
"""Puts a value, as JSON gives it, into a message; raises invalid_parameter or missing_parameter."""

_TEXT = "text"
_LONGEST_NUMBER = 400
"""Characters; a float written out in full has some 330."""

INPUTS: Mapping[int, str] = {
    TaskType.TASK_TYPE_TEXT: "text",
    TaskType.TASK_TYPE_IMAGE: "image",
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: "text_to_speech",
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: "speech_to_speech",
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: "speech_to_text",
}
"""The input of each kind in `Task`."""

_ROLES = {"system": Role.ROLE_SYSTEM, "user": Role.ROLE_USER, "assistant": Role.ROLE_ASSISTANT}


@dataclass(frozen=True, slots=True)
class Field:
    """One field: how its value goes into the message, and how the text of a form becomes that value. `read`
    raises ValueError for a text that is not the JSON that it must be."""

    put: Put
    read: Callable[[str], Any]


def _as_is(text: str) -> Any:
    return text


def _as_number(text: str) -> Any:
    # No accepted number is longer than that, and parsing a very long one would be slow.
    if len(text) > _LONGEST_NUMBER:
        return text
    try:
        return _as_json(text)
    except ValueError:
        return text  # `put` says what it must be.


def _as_json(text: str) -> Any:
    return from_json(text.encode(), allow_inf_nan=False, catch_duplicate_keys=True)


def _as_flag(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)


def _as_texts(text: str) -> Any:
    # A text such as [END] is no list.
    return _as_json(text) if text.startswith(('["', "[]")) else text


def check_text(label: str, value: Any) -> str:
    """`value` if it is a text that can be passed on.

    Raises:
        PomeloError: invalid_parameter, naming `label`.
    """
    if type(value) is not str:
        raise invalid(label, _TEXT)
    return value


def _text(name: str) -> Field:
    def put(target: Any, value: Any) -> None:
        setattr(target, name, check_text(name, value))

    return Field(put, _as_is)


def _whole(name: str, bits: int = 64) -> Field:
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1

    def put(target: Any, value: Any) -> None:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise invalid(name, "a whole number in its range")
        setattr(target, name, value)

    return Field(put, _as_number)


def _number(name: str, label: str = "") -> Field:
    label = label or name

    def put(target: Any, value: Any) -> None:
        try:
            if type(value) not in (int, float) or not isfinite(value):
                raise invalid(label, "a number in its range")
        except OverflowError:
            raise invalid(label, "a number in its range") from None
        setattr(target, name, value)

    return Field(put, _as_number)


def _flag(name: str, label: str = "") -> Field:
    label = label or name

    def put(target: Any, value: Any) -> None:
        setattr(target, name, check_flag(label, value))

    return Field(put, _as_flag)


def check_flag(label: str, value: Any) -> bool:
    """`value` if it is a boolean.

    Raises:
        PomeloError: invalid_parameter, naming `label`.
    """
    if type(value) is not bool:
        raise invalid(label, "true or false")
    return value


def _choice(name: str, values: Mapping[str, int], shown: str) -> Field:
    def put(target: Any, value: Any) -> None:
        found = values.get(value) if type(value) is str else None
        if found is None:
            raise invalid(name, f"one of {shown}")
        setattr(target, name, found)

    return Field(put, _as_is)


def _put_stop(target: Any, value: Any) -> None:
    texts = [value] if type(value) is str else value
    if type(texts) is not list:
        raise invalid("stop", "a text or a list of texts")
    for i, text in enumerate(texts):
        target.stop.append(check_text(f"stop[{i}]", text))


def _put_voice_settings(target: Any, value: Any) -> None:
    if type(value) is not dict:
        raise invalid("voice_settings", "an object")
    settings = target.voice_settings
    settings.SetInParent()
    for name, given in value.items():
        if given is None:
            continue
        field = _VOICE_SETTINGS.get(name)
        if field is None:
            raise unknown(f"voice_settings.{name}")
        field.put(settings, given)


def _put_messages(target: Any, value: Any) -> None:
    if type(value) is not list:
        raise invalid("messages", "a list of messages")
    add = target.messages.add
    for i, item in enumerate(value):
        if type(item) is dict and len(item) == 2:
            # The common shape, checked by as little as possible.
            role, content = item.get("role"), item.get("content")
            number = _ROLES.get(role) if type(role) is str else None
            if number is not None and type(content) is str:
                add(role=number, content=content)
                continue
        _put_message(add(), f"messages[{i}]", item)


def _put_message(message: Message, label: str, item: Any) -> None:
    if type(item) is not dict:
        raise invalid(label, "an object with role and content")
    check_names(item, ("role", "content"), label)
    role, content = item.get("role"), item.get("content")
    if role is None:
        raise missing(f"{label}.role")
    number = _ROLES.get(role) if type(role) is str else None
    if number is None:
        raise invalid(f"{label}.role", "system, user or assistant")
    message.role = number
    if content is None:
        raise missing(f"{label}.content")
    if type(content) is list:
        _put_parts(message.parts, f"{label}.content", content)
    elif type(content) is str:
        message.content = check_text(f"{label}.content", content)
    else:
        raise invalid(f"{label}.content", "a text or a list of parts")


def _put_parts(parts: ContentParts, label: str, items: list[Any]) -> None:
    parts.SetInParent()
    for i, item in enumerate(items):
        here = f"{label}[{i}]"
        if type(item) is not dict:
            raise invalid(here, "an object with type")
        kind = item.get("type")
        if kind is None:
            raise missing(f"{here}.type")
        if kind not in ("text", "image_url"):
            raise invalid(f"{here}.type", "one of text, image_url")
        check_names(item, ("type", kind), here)
        given = item.get(kind)
        if given is None:
            raise missing(f"{here}.{kind}")
        if kind == "text":
            parts.parts.add(text=check_text(f"{here}.text", given))
        else:
            parts.parts.add().image_url.url = _url(f"{here}.image_url", given)


def _url(label: str, given: Any) -> str:
    if type(given) is not dict:
        return check_text(label, given)
    check_names(given, ("url",), label)
    if given.get("url") is None:
        raise missing(f"{label}.url")
    return check_text(f"{label}.url", given["url"])


def check_names(given: Mapping[str, Any], known: Collection[str], label: str) -> None:
    """Refuses an object with a field that is not `known`, unless its value is null; `label` is the object's
    own name.

    Raises:
        PomeloError: invalid_parameter, naming the field.
    """
    for name, value in given.items():
        if name not in known and value is not None:
            raise unknown(f"{label}.{name}")


def unknown(name: str, task_type: int = 0) -> PomeloError:
    """The refusal of a field that a task of `task_type`, a key of INPUTS, does not have; 0: that no task
    has."""
    shown = shorten(name)
    where = f" for {INPUTS[task_type].replace('_', '-')} models" if task_type else ""
    return PomeloError("invalid_parameter", f"Unknown field{where}: {shown}. Leave it out", field=shown)


def shorten(name: str) -> str:
    """The name of a field as messages show it."""
    return name if len(name) <= 100 else name[:100] + "…"


_VOICE_SETTINGS = {
    **{
        name: _number(name, f"voice_settings.{name}")
        for name in ("stability", "similarity_boost", "style", "speed")
    },
    "use_speaker_boost": _flag("use_speaker_boost", "voice_settings.use_speaker_boost"),
}

_RESPONSE_FORMAT = _choice(
    "response_format",
    {"url": ResponseFormat.RESPONSE_FORMAT_URL, "b64_json": ResponseFormat.RESPONSE_FORMAT_B64_JSON},
    "url, b64_json",
)

_SPEECH = {
    "voice": _text("voice"),
    "voice_settings": Field(_put_voice_settings, _as_json),
    "output_format": _text("output_format"),
    "seed": _whole("seed"),
    "response_format": _RESPONSE_FORMAT,
}

FIELDS: Mapping[int, Mapping[str, Field]] = {
    TaskType.TASK_TYPE_TEXT: {
        "messages": Field(_put_messages, _as_json),
        "max_tokens": _whole("max_tokens"),
        "temperature": _number("temperature"),
        "top_p": _number("top_p"),
        "stop": Field(_put_stop, _as_texts),
        "seed": _whole("seed"),
        "presence_penalty": _number("presence_penalty"),
        "frequency_penalty": _number("frequency_penalty"),
        "user": _text("user"),
    },
    TaskType.TASK_TYPE_IMAGE: {
        "prompt": _text("prompt"),
        "width": _whole("width", 32),
        "height": _whole("height", 32),
        "num_inference_steps": _whole("num_inference_steps", 32),
        "guidance_scale": _number("guidance_scale"),
        "seed": _whole("seed"),
        "output_format": _choice(
            "output_format",
            {
                "png": ImageFormat.IMAGE_FORMAT_PNG,
                "jpeg": ImageFormat.IMAGE_FORMAT_JPEG,
                "jpg": ImageFormat.IMAGE_FORMAT_JPEG,
                "webp": ImageFormat.IMAGE_FORMAT_WEBP,
            },
            "png, jpeg, webp",
        ),
        "response_format": _RESPONSE_FORMAT,
    },
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: {
        "text": _text("text"),
        **_SPEECH,
        "language_code": _text("language_code"),
    },
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: _SPEECH,
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: {
        "language_code": _text("language_code"),
        "diarize": _flag("diarize"),
        "num_speakers": _whole("num_speakers", 32),
        "timestamps": _choice(
            "timestamps",
            {
                "none": Timestamps.TIMESTAMPS_NONE,
                "word": Timestamps.TIMESTAMPS_WORD,
                "character": Timestamps.TIMESTAMPS_CHARACTER,
            },
            "none, word, character",
        ),
    },
}
"""The fields of each kind, by name; `audio` and the fields of every task are `body`'s."""

EVERY_TASK = frozenset({"model", "stream"})
"""The fields that every kind of task has."""

KNOWN = EVERY_TASK.union({"audio"}, *FIELDS.values())
"""Every field that some kind knows."""

JSON_TEXTS = frozenset(
    name
    for fields in FIELDS.values()
    for name, field in fields.items()
    if field.read in (_as_json, _as_texts)
)
"""The fields whose text in a form is parsed as JSON."""
