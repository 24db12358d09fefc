"""Uploads of the ElevenLabs provider: forms, and files that are read while they are sent."""

from __future__ import annotations

import asyncio
import os
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
from yarl import URL

from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
)
from pomelo.providers.elevenlabs.errors import ERROR_MAPPING
from pomelo.providers.elevenlabs.forms import form
from pomelo.providers.http.client import Http
from pomelo.testing import Gate, Transcript
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.providers.elevenlabs.rig import (
    MP3,
    failure,
    form_fields,
    inline,
    job,
    read_audio,
    stored,
    transcript,
)
from tests.providers.rig import KEY, Rig
from tests.unit.refusals import refused
from tests.waiting import cancel
from tests.wav import A_LAW, MU_LAW, PCM, wav_file


@pytest.mark.parametrize(
    ("reported", "sent", "filename"),
    [
        ("audio/wav", "audio/wav", "audio.wav"),
        ("audio/webm", "audio/webm", "audio.webm"),
        ("audio/aac", "audio/aac", "audio.aac"),
        ("video/x-msvideo", "video/x-msvideo", "audio.avi"),
        ("application/octet-stream", "application/octet-stream", "audio.bin"),
        ("", "application/octet-stream", "audio.bin"),
        ('audio/x"\r\nX-Evil: 1', "application/octet-stream", "audio.bin"),
    ],
)
async def test_an_uploads_name_and_type_are_our_own(
    rig: Rig, tmp_path: Path, reported: str, sent: str, filename: str
) -> None:
    path = tmp_path / 'media_secret"name.mp3'
    path.write_bytes(MP3)
    await transcript(rig.provider, job(SpeechToTextInput(), audio=stored(path, reported)))
    received = await rig.received()
    assert received.form is not None
    assert (received.form[-1].filename, received.form[-1].content_type) == (filename, sent)
    assert received.form[-1].sha256 == sha256(MP3).hexdigest()


async def test_raw_samples_that_the_vendor_takes_are_sent_as_such(rig: Rig) -> None:
    audio = inline(b"\x00\x01" * 100, "audio/pcm;rate=16000")
    await transcript(rig.provider, job(SpeechToTextInput(), audio=audio))
    assert form_fields(await rig.received())["file_format"] == "pcm_s16le_16"
    await read_audio(rig.provider, job(SpeechToSpeechInput(voice="adam"), audio=audio))
    assert form_fields(await rig.received())["file_format"] == "pcm_s16le_16"


async def test_big_endian_samples_are_sent_as_the_little_endian_ones_that_the_vendor_takes(rig: Rig) -> None:
    audio = inline(b"\x00\x01\x02\x03", "Audio/L16; rate=16000")
    await transcript(rig.provider, job(SpeechToTextInput(), audio=audio))
    fields = form_fields(await rig.received())
    assert fields["file_format"] == "pcm_s16le_16"
    assert fields["file"] == sha256(b"\x01\x00\x03\x02").hexdigest()


@pytest.mark.parametrize(
    ("media_type", "data", "wav"),
    [
        ("audio/pcm;rate=44100", bytes(range(200)), (PCM, 44_100, 2, bytes(range(200)))),
        ("audio/L16;rate=8000", b"\x00\x01\x02\x03\x04", (PCM, 8_000, 2, b"\x01\x00\x03\x02")),
        ("audio/basic", b"\xff\x7f\x00", (MU_LAW, 8_000, 1, b"\xff\x7f\x00")),
        ("audio/x-alaw-basic", b"\xd5\x55", (A_LAW, 8_000, 1, b"\xd5\x55")),
    ],
)
async def test_raw_samples_that_the_vendor_does_not_take_are_sent_as_a_wav_file(
    rig: Rig, media_type: str, data: bytes, wav: tuple[int, int, int, bytes]
) -> None:
    await transcript(rig.provider, job(SpeechToTextInput(), audio=inline(data, media_type)))
    received = await rig.received()
    assert received.form is not None
    assert (received.form[-1].filename, received.form[-1].content_type) == ("audio.wav", "audio/wav")
    assert received.form[-1].sha256 == sha256(wav_file(*wav)).hexdigest()
    assert "file_format" not in form_fields(received)


async def test_audio_that_is_no_longer_stored_is_refused_without_its_path(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "gone.mp3"
    path.write_bytes(MP3)
    audio = stored(path)
    path.unlink()
    error, _ = await failure(rig.provider, job(SpeechToTextInput(), audio=audio))
    assert (error.code, error.field) == ("invalid_parameter", "audio")
    assert "gone" not in str(error)
    assert error.__context__ is None
    assert rig.requests == []


async def test_a_large_upload_is_streamed_from_its_file_to_the_vendor(rig: Rig, tmp_path: Path) -> None:
    size = 25 * 1024 * 1024
    path = tmp_path / "long.mp3"
    block = b"\xff\xfb\x90\xc0" + b"audio" * 200
    digest = sha256()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
            digest.update(block)
    audio = stored(path)
    await transcript(rig.provider, job(SpeechToTextInput()))
    process = psutil.Process()
    before = process.memory_info().rss
    peak = before

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    reported = await asyncio.gather(
        *(transcript(rig.provider, job(SpeechToTextInput(), audio=audio)) for _ in range(4))
    )
    changed, _ = await read_audio(rig.provider, job(SpeechToSpeechInput(voice="adam"), audio=audio))
    watching.cancel()
    assert changed
    for result in reported:
        assert result.text == f"{audio.size} bytes with SHA-256 {digest.hexdigest()}"
    assert peak - before < 24 * 1024 * 1024, "less than one upload, for five of them on both sides"


async def test_files_are_closed_however_a_call_ends(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "audio.mp3"
    path.write_bytes(MP3 * 1000)
    speech_job = job(SpeechToTextInput(), audio=stored(path))
    await transcript(rig.provider, speech_job)
    rig.script(error_reply(500, "internal_error"))
    await failure(rig.provider, speech_job)
    gate = Gate()
    rig.script(Transcript(before=(gate,)))
    task = asyncio.create_task(transcript(rig.provider, speech_job))
    await gate.reached.wait()
    await cancel(task)
    assert [file.path for file in psutil.Process().open_files() if "audio.mp3" in file.path] == []


async def test_a_file_that_becomes_shorter_while_it_is_sent_is_a_failure(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "audio.mp3"
    path.write_bytes(MP3 * 100)
    url = URL(rig.elevenlabs_base_url + "/v1/speech-to-text")
    async with Http() as http:
        with form("file", stored(path), {"model_id": "scribe_v2"}) as body:
            os.truncate(path, 10)
            with refused("provider_unavailable"):
                await http.fetch(url, {"xi-api-key": KEY}, body, ERROR_MAPPING, max_bytes=1000)
