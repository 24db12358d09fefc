"""Streamed audio of the ElevenLabs provider."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from hashlib import sha256
from typing import Any

import pytest

from pomelo.audio_formats import AUDIO_FORMATS as FORMATS
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput
from pomelo.testing import FaultUpstream, Gate, Reply, Speech
from tests.providers.elevenlabs.rig import MAKE, MP3, failure, job, read_audio, say, transcript
from tests.providers.rig import PROMPT, Rig, open_provider, run

SPEAKING = pytest.mark.parametrize(
    "speech_input", [say(PROMPT), SpeechToSpeechInput(voice="adam")], ids=["tts", "sts"]
)


@pytest.mark.parametrize("audio_format", sorted(FORMATS))
async def test_every_format_has_its_content_type_and_arrives_byte_for_byte(
    rig: Rig, audio_format: str
) -> None:
    result, kind = await read_audio(rig.provider, job(say(PROMPT, output_format=audio_format)))
    assert result == b"".join(Speech().audio(await rig.received()))
    assert kind == FORMATS[audio_format].content_type


async def test_the_shortest_file_is_as_long_as_a_signature(rig: Rig) -> None:
    for head in (b"ID3" + bytes(9), b"ID3" + bytes(8)):
        rig.script(Reply(headers={"Content-Type": "audio/mpeg"}, steps=(head,)))
    assert await read_audio(rig.provider, job()) == (b"ID3" + bytes(9), "audio/mpeg")
    assert (await failure(rig.provider, job()))[0].code == "provider_failed"


async def test_without_a_format_it_is_mp3(rig: Rig) -> None:
    assert (await read_audio(rig.provider, job()))[1] == "audio/mpeg"


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"OggS\x00\x02" + bytes(8), "audio/ogg"),
        (b"\x1aE\xdf\xa3\x00" + bytes(8), "audio/webm"),
        (b"fLaC" + bytes(8), "audio/flac"),
    ],
)
async def test_opus_is_recognized_by_its_first_bytes_even_if_they_arrive_one_by_one(
    rig: Rig, head: bytes, kind: str
) -> None:
    packets = tuple(head[at : at + 1] for at in range(len(head)))
    rig.script(Reply(headers={"Content-Type": "application/octet-stream"}, steps=packets))
    speech_input = say(output_format="opus_48000_64")
    assert await read_audio(rig.provider, job(speech_input)) == (head, kind)


@pytest.mark.parametrize("encoding", ["", "Identity "])
async def test_audio_that_is_not_compressed_may_say_so(rig: Rig, encoding: str) -> None:
    head = b"ID3" + bytes(20)
    rig.script(Reply(headers={"Content-Type": "audio/mpeg", "Content-Encoding": encoding}, steps=(head,)))
    assert await read_audio(rig.provider, job()) == (head, "audio/mpeg")


@SPEAKING
async def test_audio_arrives_while_the_vendor_still_sends(rig: Rig, speech_input: Any, stream: bool) -> None:
    gates = [Gate(), Gate()]
    rig.script(Speech(size=20_000, at={1: gates[0], 2: gates[1]}))
    async with aclosing(run(rig.provider, job(speech_input, stream=stream))) as answer:
        first = await anext(answer)
        await gates[0].reached.wait()
        assert first.audio_chunk.content_type == "audio/mpeg"
        gates[0].open()
        second = await anext(answer)
        assert second.audio_chunk.data
        assert not second.audio_chunk.content_type
        gates[1].open()
        rest = [event.audio_chunk.data async for event in answer]
    whole = b"".join(Speech(size=20_000).audio(rig.requests[0]))
    assert first.audio_chunk.data + second.audio_chunk.data + b"".join(rest) == whole


async def test_the_first_byte_is_passed_on_within_twenty_milliseconds(rig: Rig) -> None:
    clock = asyncio.get_running_loop().time
    took = []
    for _ in range(5):
        head, tail = Gate(), Gate()
        rig.script(Speech(size=20_000, at={0: head, 1: tail}))
        async with aclosing(run(rig.provider, job(stream=True))) as answer:
            first = asyncio.ensure_future(anext(answer))
            await head.reached.wait()
            since = clock()
            head.open()
            assert (await first).audio_chunk.data
            took.append(clock() - since)
    assert min(took) < 0.02


@pytest.mark.parametrize("length", [False, True], ids=["chunks", "length"])
async def test_ten_megabytes_arrive_complete_in_small_chunks(rig: Rig, length: bool) -> None:
    script = Speech(size=10_000_000, packet=200_000, length=length)
    rig.script(script)
    digest = sha256()
    async with aclosing(run(rig.provider, job(stream=True))) as answer:
        async for event in answer:
            assert len(event.audio_chunk.data) <= 65536
            digest.update(event.audio_chunk.data)
    expected = sha256()
    for packet in script.audio(rig.requests[0]):
        expected.update(packet)
    assert digest.hexdigest() == expected.hexdigest()


async def test_each_charged_request_has_its_own_connection(rig: Rig, stream: bool) -> None:
    """If a kept-alive connection breaks, it is unknown whether the vendor has done the work."""
    for _ in range(3):
        await read_audio(rig.provider, job(stream=stream))
        await transcript(rig.provider, job(SpeechToTextInput()))
    assert len({received.connection for received in rig.requests}) == len(rig.requests) == 6


async def test_the_longest_audio_is_accepted_and_longer_audio_is_not(upstream: FaultUpstream) -> None:
    async with open_provider(MAKE, upstream.elevenlabs_base_url, max_audio_bytes=len(MP3)) as provider:
        upstream.script(
            *(Reply(headers={"Content-Type": "audio/mpeg"}, steps=(MP3 + more,)) for more in (b"", b"x"))
        )
        assert (await read_audio(provider, job()))[0] == MP3
        error, _ = await failure(provider, job())
    assert error.code == "provider_failed"


async def test_concurrent_requests_do_not_mix(rig: Rig) -> None:
    async def ask(number: int) -> None:
        text = f"number {number}"
        result, _ = await read_audio(rig.provider, job(say(text), stream=number % 2 == 0))
        mine = next(received for received in rig.requests if received.body["text"] == text)
        assert result == b"".join(Speech().audio(mine))

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(ask(number))


async def test_raw_samples_that_look_like_text_are_audio(rig: Rig) -> None:
    for audio_format in ("pcm_16000", "ulaw_8000", "alaw_8000"):
        # The content type says that they are samples.
        rig.script(Reply(headers={"Content-Type": "audio/basic"}, steps=(b"{", b"<html>")))
        speech_input = say(output_format=audio_format)
        assert (await read_audio(rig.provider, job(speech_input)))[0] == b"{<html>"


async def test_raw_samples_that_begin_like_a_jpeg_are_audio(rig: Rig) -> None:
    samples = b"\xff\xd8\xff" + bytes(997)
    for audio_format in ("pcm_16000", "ulaw_8000", "alaw_8000"):
        rig.script(Reply(headers={"Content-Type": "audio/basic"}, steps=(samples,)))
        data, content_type = await read_audio(rig.provider, job(say(output_format=audio_format)))
        assert data == samples
        assert content_type.startswith("audio/")


@pytest.mark.parametrize("kind", ["application/octet-stream", "audio/mpeg"])
@pytest.mark.parametrize("audio_format", ["pcm_16000", "ulaw_8000"])
async def test_samples_with_another_content_type_may_begin_like_a_text(
    rig: Rig, audio_format: str, kind: str
) -> None:
    samples = b"<p>{not a text" + bytes(range(128, 256))
    rig.script(Reply(headers={"Content-Type": kind}, steps=(samples,)))
    speech_input = say(output_format=audio_format)
    assert (await read_audio(rig.provider, job(speech_input)))[0] == samples


@pytest.mark.parametrize("audio_format", ["mp3_44100_128", "pcm_16000", "opus_48000_32"])
async def test_the_bytes_count_before_the_requested_format(rig: Rig, audio_format: str) -> None:
    wav = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + bytes(100)
    rig.script(Reply(headers={"Content-Type": "audio/mpeg"}, steps=(wav,)))
    speech_input = say(output_format=audio_format)
    assert await read_audio(rig.provider, job(speech_input)) == (wav, "audio/wav")
