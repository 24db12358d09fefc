"""Small tasks of every type, as REST bodies and as gRPC messages."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from pomelo.gen.v1 import image_pb2, media_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions

TASK_TYPES = ("text", "image", "text_to_speech", "speech_to_speech", "speech_to_text")
AUDIO = b"some audio " * 400
TASK_BODIES: dict[str, dict[str, Any]] = {
    "text": {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello there, world"}]},
    "image": {"model": "flux-1-pro", "prompt": "A kite", "width": 96, "height": 64},
    "tts": {"model": "eleven-labs-tts", "text": "Good morning to you.", "voice": "adam"},
    "sts": {"model": "eleven-labs-sts", "audio": base64.b64encode(AUDIO).decode(), "voice": "adam"},
    "stt": {"model": "eleven-labs-stt", "audio": base64.b64encode(AUDIO).decode()},
}
"""The REST body of a small task of each type."""

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)
"""A PNG of one pixel, as a data: URI."""

_DELIVERIES = {
    "url": media_pb2.MEDIA_DELIVERY_LINK,
    "b64_json": media_pb2.MEDIA_DELIVERY_INLINE,
    "both": media_pb2.MEDIA_DELIVERY_BOTH,
    "unspecified": media_pb2.MEDIA_DELIVERY_UNSPECIFIED,
}
_TASK_TYPE_OF_MODEL = {
    "flux": "image",
    "eleven-labs-tts": "text_to_speech",
    "eleven-labs-sts": "speech_to_speech",
    "eleven-labs-stt": "speech_to_text",
}


def text_body(text: str = "Hello there", model: str = "gpt-4", **fields: Any) -> dict[str, Any]:
    """Returns the REST body of a text task with one message."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def text_task(prompt: str = "Hello, world!", model: str = "gpt-4") -> TaskSpec:
    """Returns a text task with one message."""
    message = text_pb2.Message(role=text_pb2.ROLE_USER, content=[text_pb2.ContentPart(text=prompt)])
    return TaskSpec(model=model, text=text_pb2.TextInput(messages=[message]))


def small_task(task_type: str) -> TaskSpec:
    """Returns a small task of one of `TASK_TYPES`."""
    audio = media_pb2.MediaSource(data=AUDIO, content_type="audio/mpeg")
    match task_type:
        case "image":
            image = image_pb2.ImageInput(prompt="A kite", width=64, height=64)
            return TaskSpec(model="flux-1-pro", image=image)
        case "text_to_speech":
            speech = speech_pb2.TextToSpeechInput(text="Good morning.", voice="adam")
            return TaskSpec(model="eleven-labs-tts", text_to_speech=speech)
        case "speech_to_speech":
            conversion = speech_pb2.SpeechToSpeechInput(audio=audio, voice="adam")
            return TaskSpec(model="eleven-labs-sts", speech_to_speech=conversion)
        case "speech_to_text":
            transcription = speech_pb2.SpeechToTextInput(audio=audio)
            return TaskSpec(model="eleven-labs-stt", speech_to_text=transcription)
    return text_task()


def output_field(task_type: str) -> str:
    """Returns the name of a task type's output in a TaskResult."""
    return {"text": "text", "image": "image", "speech_to_text": "transcription"}.get(task_type, "speech")


EVENTS_BETWEEN = {
    "text": {"text_delta"},
    "image": {"image_progress"},
    "text_to_speech": {"audio_chunk"},
    "speech_to_speech": {"audio_chunk"},
    "speech_to_text": set[str](),
}
"""Task type -> the events that its stream may have between the first and the last."""


def task_type_of(model: object) -> str:
    """Returns the task type of a model by its name; `text` if the name is unknown."""
    types = _TASK_TYPE_OF_MODEL.items()
    return next((task_type for start, task_type in types if str(model).startswith(start)), "text")


def to_options(body: Mapping[str, Any], *, stream: bool = False) -> TaskOptions:
    """Returns the options that are equivalent to a REST body. Does not use the gateway's code."""
    has_media = task_type_of(body.get("model")) not in ("text", "speech_to_text")
    if not has_media:
        return TaskOptions()
    return TaskOptions(delivery=_DELIVERIES[body.get("response_format", "unspecified" if stream else "both")])


def to_task(body: Mapping[str, Any]) -> TaskSpec:
    """Returns the task that is equivalent to a REST body. Does not use the gateway's code."""
    task_type = task_type_of(body.get("model"))
    task = TaskSpec(model=body.get("model", ""), user=body.get("user", ""), metadata=body.get("metadata"))
    fields = {name: value for name, value in body.items() if name not in ("model", "user", "metadata")}
    task_input = getattr(task, task_type)
    task_input.SetInParent()
    if task_type == "text":
        _set_text(task_input, fields)
    else:
        _set_media(task_input, task_type, fields)
    for name, value in fields.items():
        if name in task_input.DESCRIPTOR.fields_by_name:
            setattr(task_input, name, value)
    return task


def _set_text(text: text_pb2.TextInput, fields: dict[str, Any]) -> None:
    for message in fields.pop("messages", []):
        sent = text.messages.add()
        if "role" in message:
            role = "system" if message["role"] == "developer" else message["role"]
            sent.role = text_pb2.Role.Value(f"ROLE_{role.upper()}")
        sent.name = message.get("name", "")
        content = message.get("content")
        if message.get("role") == "tool":
            sent.content.add().tool_result.tool_call_id = message["tool_call_id"]
            texts = [part["text"] for part in content] if isinstance(content, list) else [content]
            sent.content[0].tool_result.content = "".join(texts)
            continue
        parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        for part in parts:
            if part["type"] == "text":
                sent.content.add(text=part["text"])
            else:
                sent.content.add().image.source.url = part["image_url"]["url"]
        for call in message.get("tool_calls", []):
            made = sent.content.add().tool_call
            made.id, function = call["id"], call["function"]
            made.name, made.arguments_json = function["name"], function["arguments"]
    stop = fields.pop("stop", [])
    text.stop.extend([stop] if isinstance(stop, str) else stop)
    _set_tools(text, fields)


def _set_tools(text: text_pb2.TextInput, fields: dict[str, Any]) -> None:
    for tool in fields.pop("tools", []):
        function = dict(tool["function"])
        parameters = function.pop("parameters", None)
        text.tools.add(**function, parameters_json="" if parameters is None else json.dumps(parameters))
    choice = fields.pop("tool_choice", None)
    if isinstance(choice, str):
        text.tool_choice.mode = text_pb2.ToolChoice.Mode.Value(f"MODE_{choice.upper()}")
    elif choice is not None:
        text.tool_choice.tool = choice["function"]["name"]
    output_format = fields.pop("response_format", {"type": "text"})
    if output_format["type"] == "json_object":
        text.format.json_object.SetInParent()
    elif output_format["type"] == "json_schema":
        definition = dict(output_format["json_schema"])
        schema = json.dumps(definition.pop("schema"))
        text.format.json_schema.CopyFrom(text_pb2.JsonSchema(**definition, schema_json=schema))
    effort = fields.pop("reasoning_effort", None)
    if effort is not None:
        text.reasoning_effort = text_pb2.ReasoningEffort.Value(f"REASONING_EFFORT_{effort.upper()}")


def _set_media(task_input: Any, task_type: str, fields: dict[str, Any]) -> None:
    audio = fields.pop("audio", None)
    if audio is not None and task_type != "text_to_speech":
        task_input.audio.data = base64.b64decode(audio)
    timestamps = fields.pop("timestamps", None)
    if timestamps is not None:
        name = f"TIMESTAMP_GRANULARITY_{timestamps.upper()}"
        task_input.timestamps = speech_pb2.TimestampGranularity.Value(name)
    if task_type == "image" and "output_format" in fields:
        name = f"IMAGE_FORMAT_{fields.pop('output_format').upper()}"
        task_input.output_format = image_pb2.ImageFormat.Value(name)
    for name, value in fields.pop("voice_settings", {}).items():
        setattr(task_input.voice_settings, name, value)
