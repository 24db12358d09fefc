"""Results and models as JSON, against the documented shapes."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from gateway.errors import error_body
from gateway.media import public_links
from gateway.objects import render_model
from gateway.types import TASK_FORMATS, render_result
from gateway.types.base import Link, StreamObjects
from gateway.types.text.results import render_delta, render_last, render_tool_call
from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.model_service_pb2 import Model, PriceUnit
from pomelo.gen.v1.task_pb2 import TaskResult, TaskStarted, TaskType
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, TextOutput, ToolCall, ToolCallDelta

AWKWARD = 'quote " back\\slash \n \x01 \u2028 é 🍊 </script>'


def result(**output: Any) -> TaskResult:
    task_result = TaskResult(id="x_1", model=AWKWARD)
    task_result.create_time.seconds = 1234567890
    for name, value in output.items():
        getattr(task_result, name).MergeFrom(value)
    return task_result


def rendered(task_result: TaskResult, link: Link = str) -> dict[str, Any]:
    value = json.loads(render_result(task_result, link))
    assert (value["id"], value["created"], value["model"]) == ("x_1", 1234567890, AWKWARD)
    assert isinstance(value, dict)
    return value


def test_a_completion_has_the_documented_shape() -> None:
    task_result = result()
    task_result.text.message.content.add(text=AWKWARD)
    task_result.text.finish_reason = FinishReason.FINISH_REASON_LENGTH
    task_result.usage.input_tokens, task_result.usage.output_tokens = 10, 25
    assert rendered(task_result) == {
        "id": "x_1",
        "object": "task.completion",
        "created": 1234567890,
        "model": AWKWARD,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": AWKWARD},
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 25, "total_tokens": 35},
    }


def test_the_parts_of_a_message_are_joined_to_its_content() -> None:
    task_result = result()
    task_result.text.SetInParent()
    assert rendered(task_result)["choices"][0]["message"]["content"] == ""
    for text in ("one ", "", "two"):
        task_result.text.message.content.add(text=text)
    assert rendered(task_result)["choices"][0]["message"]["content"] == "one two"


@pytest.mark.parametrize(("cached", "written"), [(7, 0), (0, 5), (7, 5)])
def test_cached_tokens_are_rendered_if_there_are_any(cached: int, written: int) -> None:
    task_result = result()
    task_result.text.SetInParent()
    usage = task_result.usage
    usage.cached_input_tokens, usage.cache_write_input_tokens = cached, written
    assert rendered(task_result)["usage"]["prompt_tokens_details"] == {
        "cached_tokens": cached,
        "cache_write_tokens": written,
    }


@pytest.mark.parametrize(("text", "content"), [("", None), (AWKWARD, AWKWARD)])
def test_tool_calls_have_the_shape_of_openai(text: str, content: str | None) -> None:
    task_result = result()
    parts = task_result.text.message.content
    if text:
        parts.add(text=text)
    parts.add().tool_call.MergeFrom(ToolCall(id="call_1", name="weather", arguments_json='{"city":"é"}'))
    parts.add().tool_call.MergeFrom(ToolCall(id="call_2", name="now", arguments_json=AWKWARD))
    assert rendered(task_result)["choices"][0]["message"] == {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city":"é"}'},
            },
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": AWKWARD}},
        ],
    }


def test_pieces_of_tool_calls_have_the_shape_of_openai() -> None:
    objects = StreamObjects(TaskStarted(id="x_1"))
    first = ToolCallDelta(index=0, id="call_1", name="weather")
    deltas = []
    for piece in (
        first,
        ToolCallDelta(index=0, arguments_json=AWKWARD),
        ToolCallDelta(index=1, id="b", name="now"),
    ):
        (chunk,) = render_tool_call(objects, piece)
        (choice,) = json.loads(chunk)["choices"]
        assert (choice["index"], choice["finish_reason"]) == (0, None)
        deltas.append(choice["delta"])
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    assert deltas == [
        {"role": "assistant", "tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": AWKWARD}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "b", "type": "function", "function": {"name": "now", "arguments": ""}}
            ]
        },
    ]
    last = json.loads(render_last(objects, result()))
    assert last["choices"][0]["delta"] == {}


def test_reasoning_tokens_are_rendered_if_there_are_any() -> None:
    task_result = result()
    task_result.text.SetInParent()
    task_result.usage.output_tokens, task_result.usage.reasoning_tokens = 9, 4
    assert rendered(task_result)["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        (FinishReason.FINISH_REASON_STOP, "stop"),
        (FinishReason.FINISH_REASON_LENGTH, "length"),
        (FinishReason.FINISH_REASON_CONTENT_FILTER, "content_filter"),
        (FinishReason.FINISH_REASON_TOOL_CALLS, "tool_calls"),
        (FinishReason.FINISH_REASON_UNSPECIFIED, None),
    ],
)
def test_each_finish_reason_has_its_own_name(reason: FinishReason.ValueType, shown: str | None) -> None:
    task_result = result()
    task_result.text.finish_reason = reason
    assert rendered(task_result)["choices"][0]["finish_reason"] == shown
    last = json.loads(render_last(StreamObjects(TaskStarted()), task_result))
    assert last["choices"][0]["finish_reason"] == shown


def test_a_model_is_rendered_with_null_for_missing_dates() -> None:
    model = Model(id="m", price_version="v1", available=True)
    value = render_model(model)
    assert (value["id"], value["type"], value["price_version"]) == ("m", "unknown", "v1")
    assert (value["available"], value["deprecated"], value["retires"]) == (True, None, None)
    assert "price_tiers" not in value
    model.available = False
    model.deprecate_time.seconds = 1_795_478_400
    model.retire_time.seconds = 1_795_478_400 + 86_400
    value = render_model(model)
    assert (value["available"], value["deprecated"], value["retires"]) == (
        False,
        "2026-11-24",
        "2026-11-25",
    )


def test_media_is_rendered_with_the_link_and_the_bytes_of_the_result() -> None:
    data = bytes(range(256))
    encoded = base64.b64encode(data).decode()
    link = public_links("https://pomelo.example/")
    task_result = result()
    image = task_result.image.images.add(data=data, content_type="image/png")
    assert rendered(task_result, link)["data"] == [{"b64_json": encoded}]
    image.media.url = "http://10.0.0.1:1/media/media_1.png?exp=1&sig=a%22"
    url = "https://pomelo.example/media/media_1.png?exp=1&sig=a%22"
    assert rendered(task_result, link)["data"] == [{"url": url, "b64_json": encoded}]
    task_result.image.images[0].data = b""
    assert rendered(task_result, link)["data"] == [{"url": url}]
    task_result = result()
    task_result.speech.data = data
    task_result.speech.media.url = "/media/media_1.mp3"
    assert rendered(task_result, str)["audio"] == {"url": "/media/media_1.mp3", "b64_json": encoded}


def test_a_transcript_names_speakers_only_if_they_were_distinguished() -> None:
    task_result = result()
    task_result.transcription.text = AWKWARD
    task_result.transcription.language_code = "en"
    half, one, two = Duration(nanos=500_000_000), Duration(seconds=1), Duration(seconds=2)
    task_result.transcription.words.add(text="hi", start_offset=half, end_offset=one)
    task_result.transcription.words.add(text="ho", start_offset=one, end_offset=two, speaker="speaker_1")
    value = rendered(task_result)
    assert value["object"] == "speech.transcription"
    assert (value["text"], value["language"]) == (AWKWARD, "en")
    assert value["words"] == [
        {"text": "hi", "start": 0.5, "end": 1.0, "speaker": None},
        {"text": "ho", "start": 1.0, "end": 2.0, "speaker": "speaker_1"},
    ]


@pytest.mark.parametrize(
    ("seconds", "nanos", "shown"),
    [(0, 79_000_000, 0.079), (0, 11_000_033, 0.011000033), (3, 688_845_559, 3.688845559)],
)
def test_the_times_of_words_are_rounded_once(seconds: int, nanos: int, shown: float) -> None:
    task_result = result()
    offset = Duration(seconds=seconds, nanos=nanos)
    task_result.transcription.words.add(start_offset=offset, end_offset=offset)
    value = rendered(task_result)
    assert (value["words"][0]["start"], value["words"][0]["end"]) == (shown, shown)
    assert value["language"] == ""


def test_the_chunks_of_a_text_join_to_the_text_and_the_role_is_sent_once() -> None:
    started = TaskStarted(id="x_1", model=AWKWARD)
    objects = StreamObjects(started)
    texts = ["a", AWKWARD, ""]
    chunks = [json.loads(one) for text in texts for one in render_delta(objects, TextDelta(text=text))]
    output = TextOutput(finish_reason=FinishReason.FINISH_REASON_STOP)
    last = json.loads(render_last(objects, TaskResult(text=output)))
    assert {chunk["object"] for chunk in [*chunks, last]} == {"task.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": "a"}, {"content": AWKWARD}, {"content": ""}]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert set(last["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}


@pytest.mark.parametrize("texts", [["all"], []], ids=["a text", "no text"])
def test_the_first_chunk_of_a_text_has_role_and_content(texts: list[str]) -> None:
    objects = StreamObjects(TaskStarted(id="x_1"))
    chunks = [one for text in texts for one in render_delta(objects, TextDelta(text=text))]
    output = TextOutput(finish_reason=FinishReason.FINISH_REASON_CONTENT_FILTER)
    chunks.append(render_last(objects, TaskResult(text=output)))
    choices = [json.loads(chunk)["choices"] for chunk in chunks]
    deltas = [choice["delta"] for (choice,) in choices]
    assert deltas == [{"role": "assistant", "content": "".join(texts)}, *({} for _ in texts)]
    assert (choices[-1][0]["index"], choices[-1][0]["finish_reason"]) == (0, "content_filter")


def test_every_task_type_and_price_unit_has_a_public_name() -> None:
    task_types = [v for v in TaskType.values() if v]
    assert set(TASK_FORMATS) == set(task_types)
    model = Model(id="m", task_type=TaskType.TASK_TYPE_IMAGE)
    for unit in PriceUnit.values():
        if unit:
            model.prices.add(unit=unit, amount_micros=1_234_500 if unit == 3 else 3_000_000)
    price = render_model(model)["price"]
    assert price["image"] == "1.2345"
    assert price["million_input_tokens"] == "3"
    assert set(price) == {
        "million_input_tokens",
        "million_cached_input_tokens",
        "million_cache_write_input_tokens",
        "million_cache_write_1h_input_tokens",
        "million_output_tokens",
        "image",
        "megapixel",
        "thousand_characters",
        "audio_minute",
        "audio_hour",
        "provider_dollar",
    }


@pytest.mark.parametrize("code", TABLE)
def test_an_error_body_is_message_type_and_code(code: str) -> None:
    value = json.loads(error_body(PomeloError(code, AWKWARD)))
    assert value == {"error": {"message": AWKWARD, "type": TABLE[code].type, "code": code}}


def test_an_error_that_quotes_invalid_unicode_is_still_rendered() -> None:
    assert json.loads(error_body(PomeloError("invalid_parameter", "a\udcffb")))["error"]["message"] == "a?b"


def test_a_price_unit_that_is_newer_than_the_gateway_has_its_number() -> None:
    model = Model.FromString(Model(id="m").SerializeToString())
    price = model.prices.add(amount_micros=1_000_000)
    price.MergeFromString(b"\x08\x63")  # the unit 99
    assert render_model(model)["price"] == {"unit_99": "1"}
