"""The images of a conversation: whatever they are sent as, they become one canonical `data:` URI."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.text_pb2 import ContentPart, ImagePart, TextInput
from pomelo.tasks import text
from tests.unit.refusals import refused
from tests.unit.tasks.collectors import MODELS, no_files, refusal, task_input

IMAGES = {
    "image/png": b"\x89PNG\r\n\x1a\n" + bytes(range(64)),
    "image/jpeg": b"\xff\xd8\xff\xe0" + bytes(range(63)),
    "image/gif": b"GIF89a" + bytes(range(62)),
    "image/webp": b"RIFF\x40\0\0\0WEBPVP8 " + bytes(range(61)),
}
FIELD = "messages[0].content[1].image_url"


def conversation(source: MediaSource) -> TextInput:
    """A message with a text, then an image."""
    given: TextInput = task_input("gpt-4")
    given.messages[0].content.append(ContentPart(image=ImagePart(source=source)))
    return given


def canonical(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("content_type", ["", "image/png", "text/plain", "audio/mpeg"])
@pytest.mark.parametrize("media_type", IMAGES)
def test_an_image_becomes_the_same_uri_from_bytes_from_a_file_and_from_any_spelling_of_a_uri(
    media_type: str, content_type: str
) -> None:
    data = IMAGES[media_type]
    encoded = base64.b64encode(data).decode()
    sources: list[dict[str, Any]] = [
        {"data": data},
        {"media_id": "media_1"},
        {"url": canonical(data, media_type)},
        {"url": f"data:text/plain;base64,{encoded}"},
        {
            "url": f"DATA:image/png;name=a.png;BASE64,{encoded.rstrip('=').replace('+', '-').replace('/', '_')}"
        },
        {"url": f"data:;base64,{encoded[:7]}\n {encoded[7:].replace('=', '%3D')}"},
    ]
    asked: list[tuple[str, str]] = []

    def read(media_id: str, field: str) -> bytes:
        asked.append((media_id, field))
        return data

    inputs = []
    for source in sources:
        given = conversation(MediaSource(content_type=content_type, **source))
        text.check(given, MODELS["gpt-4"], read)
        inputs.append(given)
    assert asked == [("media_1", FIELD)]
    expected = conversation(MediaSource(url=canonical(data, media_type)))
    assert inputs == [expected] * len(sources)
    assert {one.SerializeToString(deterministic=True) for one in inputs} == {expected.SerializeToString()}


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"<svg></svg>", b"%PDF-1.7", b"OggS" + bytes(20)])
@pytest.mark.parametrize("content_type", ["", "image/png"])
def test_bytes_that_are_no_image_are_refused_wherever_they_are(data: bytes, content_type: str) -> None:
    encoded = base64.b64encode(data).decode()
    sources: list[dict[str, Any]] = [
        {"data": data},
        {"media_id": "m"},
        {"url": f"data:image/png;base64,{encoded}"},
    ]
    for source in sources:
        given = conversation(MediaSource(content_type=content_type, **source))
        with refused("invalid_parameter", FIELD, match="a PNG, JPEG, WebP or GIF image"):
            text.check(given, MODELS["gpt-4"], lambda media_id, field: data)


@pytest.mark.parametrize("source", [{"url": ""}, {"url": "https://example.org/a.png"}])
def test_an_image_without_its_bytes_is_refused(source: dict[str, Any]) -> None:
    given = conversation(MediaSource(**source))
    assert refusal("gpt-4", given) == f"invalid_parameter {FIELD}"


@pytest.mark.parametrize("source", [{}, {"content_type": "image/png"}])
def test_an_image_without_a_source_is_missing(source: dict[str, Any]) -> None:
    assert refusal("gpt-4", conversation(MediaSource(**source))) == f"missing_parameter {FIELD}.url"


def test_what_refuses_a_file_is_not_changed() -> None:
    def read(media_id: str, field: str) -> bytes:
        raise error

    for code in ("payload_too_large", "store_unavailable"):
        error = PomeloError(code, field=FIELD)
        with refused(code, FIELD):
            text.check(conversation(MediaSource(media_id="media_1")), MODELS["gpt-4"], read)


def test_a_text_beside_images_is_unchanged() -> None:
    given = conversation(MediaSource(data=IMAGES["image/png"]))
    given.messages[0].content.add(text="Which?")
    text.check(given, MODELS["gpt-4"], no_files)
    parts = given.messages[0].content
    assert [part.WhichOneof("part") for part in parts] == ["text", "image", "text"]
    assert (parts[0].text, parts[2].text) == ("one two three", "Which?")
