"""Every argument of a task becomes its field of the contract, and every part of a result can be read."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from pomelo.client import TextResult, Tool, assistant, tasks, tool_result, user
from pomelo.client.messages import JsonSchema
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import ContentPart, Message, ToolCall

VOICE: Any = {
    "stability": 0.5,
    "similarity_boost": 0.25,
    "style": 0.75,
    "use_speaker_boost": False,
    "speed": 1.5,
}
SPOKEN: dict[str, Any] = {
    "voice": "adam",
    "voice_settings": VOICE,
    "output_format": "opus_48000_32",
    "seed": 7,
}
AUDIO = {"data": "UklGRg==", "content_type": "audio/wav"}  # RIFF
HEARD: dict[str, Any] = {"content_type": "audio/wav"}
TEXT: dict[str, Any] = {
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.25,
    "stop": ["a", "b"],
    "presence_penalty": 0.75,
    "frequency_penalty": 1.5,
    "parallel_tool_calls": False,
}
NOW = Tool("now", "The time", {"type": "object"}, strict=True)


@pytest.mark.parametrize(
    ("task", "field", "expected"),
    [
        pytest.param(
            tasks.text(
                "m",
                "Hi",
                system="Be brief",
                seed=7,
                tools=[NOW],
                tool_choice="required",
                format=JsonSchema({"type": "object"}, "answer", "An answer", strict=False),
                reasoning_effort="low",
                **TEXT,
            ),
            "text",
            TEXT
            | {
                "max_tokens": "5",
                "seed": "7",
                "messages": [
                    {"role": "ROLE_SYSTEM", "content": [{"text": "Be brief"}]},
                    {"role": "ROLE_USER", "content": [{"text": "Hi"}]},
                ],
                "tools": [
                    {
                        "name": "now",
                        "description": "The time",
                        "parameters_json": '{"type": "object"}',
                        "strict": True,
                    }
                ],
                "tool_choice": {"mode": "MODE_REQUIRED"},
                "format": {
                    "json_schema": {
                        "name": "answer",
                        "description": "An answer",
                        "schema_json": '{"type": "object"}',
                        "strict": False,
                    }
                },
                "reasoning_effort": "REASONING_EFFORT_LOW",
            },
            id="text",
        ),
        pytest.param(
            tasks.image(
                "m",
                "A kite",
                width=512,
                height=256,
                num_inference_steps=9,
                guidance_scale=2.5,
                seed=7,
                output_format="webp",
            ),
            "image",
            {
                "prompt": "A kite",
                "width": 512,
                "height": 256,
                "num_inference_steps": 9,
                "guidance_scale": 2.5,
                "seed": "7",
                "output_format": "IMAGE_FORMAT_WEBP",
            },
            id="image",
        ),
        pytest.param(
            tasks.speech("m", "Hi", language_code="de", **SPOKEN),
            "text_to_speech",
            {**SPOKEN, "text": "Hi", "language_code": "de", "seed": "7"},
            id="speech",
        ),
        pytest.param(
            tasks.convert_speech("m", b"RIFF", **SPOKEN, **HEARD),
            "speech_to_speech",
            {**SPOKEN, "audio": AUDIO, "seed": "7"},
            id="convert_speech",
        ),
        pytest.param(
            tasks.transcribe(
                "m", b"RIFF", language_code="de", diarize=True, num_speakers=3, timestamps="word", **HEARD
            ),
            "speech_to_text",
            {
                "audio": AUDIO,
                "language_code": "de",
                "diarize": True,
                "num_speakers": 3,
                "timestamps": "TIMESTAMP_GRANULARITY_WORD",
            },
            id="transcribe",
        ),
    ],
)
def test_every_argument_is_its_field_of_the_contract(
    task: tasks.Task[Any, Any], field: str, expected: dict[str, Any]
) -> None:
    message = getattr(task.spec, field)
    assert MessageToDict(task.spec, preserving_proto_field_name=True) == {"model": "m", field: expected}
    assert {each.name for each in message.DESCRIPTOR.fields} == expected.keys(), "a field without an argument"


@pytest.mark.parametrize(
    ("delivery", "value"),
    [("bytes", "MEDIA_DELIVERY_INLINE"), ("link", "MEDIA_DELIVERY_LINK"), ("both", "MEDIA_DELIVERY_BOTH")],
)
def test_the_arguments_of_every_task_are_those_of_the_contract(delivery: Any, value: str) -> None:
    for task in (
        tasks.image("m", "A kite", delivery=delivery, user="u", metadata={"a": "b"}),
        tasks.speech("m", "Hi", voice="adam", delivery=delivery, user="u", metadata={"a": "b"}),
        tasks.convert_speech("m", b"x", voice="adam", delivery=delivery, user="u", metadata={"a": "b"}),
    ):
        assert (task.spec.user, dict(task.spec.metadata)) == ("u", {"a": "b"})
        assert MessageToDict(task.options) == {"delivery": value}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            user("Look", images=[b"\x89PNG\r\n\x1a\n"], detail="low", name="Ann"),
            {"role": "ROLE_USER", "name": "Ann"},
        ),
        (assistant("Hi"), {"role": "ROLE_ASSISTANT"}),
        (tool_result(ToolCall(id="c1", name="now", arguments_json="{}"), "noon"), {"role": "ROLE_TOOL"}),
    ],
    ids=["user", "assistant", "tool"],
)
def test_a_message_has_its_role_and_name(message: Message, expected: dict[str, str]) -> None:
    found = MessageToDict(message, preserving_proto_field_name=True)
    del found["content"]
    assert found == expected


@pytest.mark.parametrize(
    ("parts", "text", "calls"),
    [
        ([], "", []),
        (["one", " two"], "one two", []),
        (["one", ToolCall(id="c1")], "one", ["c1"]),
        ([ToolCall(id="c1"), ToolCall(id="c2")], "", ["c1", "c2"]),
    ],
)
def test_the_texts_and_calls_of_a_result_are_those_of_its_parts(
    parts: list[Any], text: str, calls: list[str]
) -> None:
    result = TextResult(TaskResult(), {})
    for part in parts:
        content = ContentPart(text=part) if isinstance(part, str) else ContentPart(tool_call=part)
        result.raw.text.message.content.append(content)
    assert result.text == text
    assert [call.id for call in result.tool_calls] == calls
