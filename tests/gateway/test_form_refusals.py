"""What the refusal of a form says."""

from __future__ import annotations

import pytest

from tests.gateway.gateway_app import AUDIO, GatewayApp
from tests.gateway.requests import FORM, raw_task
from tests.gateway.test_multipart import FILE, Part, form, model, send


@pytest.mark.parametrize(
    "audio", [b"input.mp3", b"undefined", b"[object File]", b"https://example.com/a.mp3", b""]
)
async def test_a_text_in_place_of_a_file_is_refused_with_what_to_send(
    gateway: GatewayApp, audio: bytes
) -> None:
    status, value = await send(gateway, form(model("eleven-labs-stt"), ('name="audio"', audio)))
    assert (status, value["error"]["code"]) == (400, "invalid_parameter")
    assert value["error"]["message"].startswith("Invalid audio: ")
    assert value["error"]["message"].endswith(". In a form, send a file, with a file name")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            ('name="audio"', b"ID3\xff"),
            "Invalid audio: must be a file: the part needs a filename, or the media type of its bytes",
        ),
        (('name="file"; filename="in.mp3"', AUDIO), "Unknown field: file. Leave it out, or use audio"),
        (('name="Audio"; filename="in.mp3"', AUDIO), "Unknown field: Audio. Use audio, or leave it out"),
        (('name="numSpeakers"', b"2"), "Unknown field: numSpeakers. Use num_speakers, or leave it out"),
        (('name="speed"', b"1"), "Unknown field: speed. Use voice_settings.speed, or leave it out"),
        (('name="color"', b"red"), "Unknown field: color. Leave it out"),
        (('name="color[0]"', b"red"), "Unknown field: color[0]. Leave it out"),
        (
            ('name="voice_settings[speed]"', b"1"),
            "Invalid voice_settings: must be one field with JSON text, not voice_settings[speed]",
        ),
        (
            ('name="voice_settings.speed"', b"1"),
            "Invalid voice_settings: must be one field with JSON text, not voice_settings.speed",
        ),
        (
            ('name="messages[0][role]"', b"user"),
            "Invalid messages: must be one field with JSON text, not messages[0][role]",
        ),
    ],
)
async def test_the_refusal_of_a_part_says_what_to_send_in_its_place(
    gateway: GatewayApp, part: Part, message: str
) -> None:
    status, value = await send(gateway, form(model("eleven-labs-stt"), part))
    assert (status, value["error"]["message"]) == (400, message)


@pytest.mark.parametrize("path", ["/api/v1/task", "/v1/audio/transcriptions"])
@pytest.mark.parametrize("is_first", [True, False], ids=["before the file", "after it"])
async def test_an_empty_model_is_missing_wherever_it_is(
    gateway: GatewayApp, path: str, is_first: bool
) -> None:
    file: Part = (f'name="{"file" if path.startswith("/v1") else "audio"}"; filename="a.mp3"', AUDIO)
    parts = [model(""), file] if is_first else [file, model("")]
    headers = {**gateway.headers, "Content-Type": FORM}
    sending = gateway.http.post(gateway.url + path, data=form(*parts), headers=headers)
    async with sending as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (400, "missing_parameter")
    assert error["message"] == "Missing required field: model"


async def test_the_refusal_of_a_form_without_a_boundary_says_who_sets_it(gateway: GatewayApp) -> None:
    status, value = await send(gateway, form(model("eleven-labs-stt"), FILE), "multipart/form-data")
    assert (status, value["error"]["code"]) == (400, "invalid_body")
    assert value["error"]["message"] == (
        "Content-Type has no valid boundary of the form. Let your HTTP client set it"
    )


async def test_a_text_in_two_bytes_a_character_is_not_taken_for_ascii(gateway: GatewayApp) -> None:
    for text, status in ((b"kite", b"200"), ("kite".encode("utf-16-le"), b"400")):
        parts = b"".join(
            b'--B\r\nContent-Disposition: form-data; name="%b"\r\n%b\r\n%b\r\n' % part
            for part in (
                (b"model", b"", b"flux-1-pro"),
                (b"prompt", b"Content-Type: text/plain; charset=utf-16\r\n", text),
            )
        )
        received = await gateway.exchange(raw_task(parts + b"--B--\r\n", content_type=FORM))
        assert received.split()[1] == status
