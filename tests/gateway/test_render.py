"""Results and models as JSON, against the documented shapes."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from gateway.errors import error_body
from gateway.media import byte_range, public_links
from gateway.routes import render_model
from gateway.task import raw_media_range
from gateway.types import TASK_FORMATS, render_result
from gateway.types.base import Link, StreamObjects
from gateway.types.text import render_delta
from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.model_service_pb2 import Model, PriceUnit
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType
from pomelo.gen.v1.task_service_pb2 import TaskStarted
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta

AWKWARD = 'quote " back\\slash \n \x01 \u2028 é 🍊 </script>'


def result(**output: Any) -> TaskResult:
    made = TaskResult(id="x_1", model=AWKWARD)
    made.created.seconds = 1234567890
    for name, value in output.items():
        getattr(made, name).MergeFrom(value)
    return made


def shown(made: TaskResult, link: Link = str) -> dict[str, Any]:
    value = json.loads(render_result(made, link))
    assert (value["id"], value["created"], value["model"]) == ("x_1", 1234567890, AWKWARD)
    assert isinstance(value, dict)
    return value


def test_a_completion_has_the_documented_shape() -> None:
    made = result()
    made.text.content = AWKWARD
    made.text.finish_reason = FinishReason.FINISH_REASON_LENGTH
    made.text.usage.prompt_tokens, made.text.usage.completion_tokens, made.text.usage.total_tokens = (
        10,
        25,
        35,
    )
    assert shown(made) == {
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


def test_media_is_rendered_with_the_link_and_the_bytes_of_the_result() -> None:
    data = bytes(range(256))
    encoded = base64.b64encode(data).decode()
    link = public_links("https://pomelo.example/")
    made = result()
    picture = made.image.images.add(data=data, content_type="image/png")
    assert shown(made, link)["data"] == [{"b64_json": encoded}]
    picture.media.url = "http://10.0.0.1:1/media/media_1.png?exp=1&sig=a%22"
    url = "https://pomelo.example/media/media_1.png?exp=1&sig=a%22"
    assert shown(made, link)["data"] == [{"url": url, "b64_json": encoded}]
    made.image.images[0].data = b""
    assert shown(made, link)["data"] == [{"url": url}]
    made = result()
    made.speech.data = data
    made.speech.media.url = "/media/media_1.mp3"
    assert shown(made, str)["audio"] == {"url": "/media/media_1.mp3", "b64_json": encoded}


def test_a_transcript_names_speakers_only_if_they_were_distinguished() -> None:
    made = result()
    made.transcription.text = AWKWARD
    made.transcription.language = "en"
    made.transcription.words.add(text="hi", start=0.5, end=1)
    made.transcription.words.add(text="ho", start=1, end=2, speaker="speaker_1")
    value = shown(made)
    assert value["object"] == "speech.transcription"
    assert (value["text"], value["language"]) == (AWKWARD, "en")
    assert value["words"] == [
        {"text": "hi", "start": 0.5, "end": 1.0, "speaker": None},
        {"text": "ho", "start": 1.0, "end": 2.0, "speaker": "speaker_1"},
    ]


def test_the_chunks_of_a_text_join_to_the_text_and_the_role_is_sent_once() -> None:
    started = TaskStarted(id="x_1", model=AWKWARD)
    objects = StreamObjects(started)
    texts = ["a", AWKWARD, ""]
    chunks = [json.loads(one) for text in texts for one in render_delta(objects, TextDelta(content=text))]
    assert render_delta(objects, TextDelta(finish_reason=FinishReason.FINISH_REASON_STOP)) == ()
    last = json.loads(objects.last)
    assert {chunk["object"] for chunk in [*chunks, last]} == {"task.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": "a"}, {"content": AWKWARD}, {"content": ""}]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert set(last["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}


def test_a_text_of_one_chunk_has_role_and_content() -> None:
    delta = TextDelta(content="all", finish_reason=FinishReason.FINISH_REASON_CONTENT_FILTER)
    objects = StreamObjects(TaskStarted(id="x_1"))
    assert render_delta(objects, delta) == ()
    last = json.loads(objects.last)
    assert last["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": "all"}, "finish_reason": "content_filter"}
    ]


def test_every_task_type_and_price_unit_has_a_public_name() -> None:
    kinds = [v for v in TaskType.values() if v]
    assert set(TASK_FORMATS) == set(kinds)
    model = Model(name="m", task_type=TaskType.TASK_TYPE_IMAGE)
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
        "provider_dollar",
    }


@pytest.mark.parametrize("code", TABLE)
def test_an_error_body_is_message_type_and_code(code: str) -> None:
    value = json.loads(error_body(PomeloError(code, AWKWARD)))
    assert value == {"error": {"message": AWKWARD, "type": TABLE[code].type, "code": code}}


def test_an_error_that_quotes_invalid_unicode_is_still_rendered() -> None:
    assert json.loads(error_body(PomeloError("invalid_parameter", "a\udcffb")))["error"]["message"] == "a?b"


@pytest.mark.parametrize(
    ("accept", "kind", "wanted"),
    [
        (None, TaskType.TASK_TYPE_IMAGE, False),
        ("*/*", TaskType.TASK_TYPE_IMAGE, False),
        ("image/*", TaskType.TASK_TYPE_IMAGE, True),
        ("image/*;q=0", TaskType.TASK_TYPE_IMAGE, False),
        ("image/*; Q=0.0, image/webp", TaskType.TASK_TYPE_IMAGE, True),
        ("IMAGE/PNG;q=0.5", TaskType.TASK_TYPE_IMAGE, True),
        ("application/json, image/*", TaskType.TASK_TYPE_IMAGE, False),
        ("text/html, image/webp, */*;q=0.8", TaskType.TASK_TYPE_IMAGE, True),
        ("audio/*", TaskType.TASK_TYPE_IMAGE, False),
        ("audio/mpeg", TaskType.TASK_TYPE_SPEECH_TO_SPEECH, True),
        ("audio/*", TaskType.TASK_TYPE_TEXT, False),
        ("audio/*", TaskType.TASK_TYPE_SPEECH_TO_TEXT, False),
        (",;,", TaskType.TASK_TYPE_TEXT_TO_SPEECH, False),
    ],
)
def test_raw_media_is_sent_only_if_accept_asks_for_it(accept: str | None, kind: int, wanted: bool) -> None:
    assert bool(raw_media_range(accept, TASK_FORMATS[kind])) is wanted


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=10-", (10, 100)),
        ("bytes=90-200", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-200", (0, 100)),
        ("bytes=100-", None),
        ("bytes=5-4", None),
        ("bytes=-0", None),
        ("bytes=-", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
        (None, None),
    ],
)
def test_a_satisfiable_range_is_served_and_the_complete_file_otherwise(
    given: str | None, part: tuple[int, int] | None
) -> None:
    assert byte_range(given, 100) == part
