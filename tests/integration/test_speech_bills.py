"""The cost of speech and transcripts on every protocol: unary, streamed and interrupted."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import struct
import wave
from collections.abc import AsyncIterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from google.protobuf.duration_pb2 import Duration

from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.protobuf.times import from_duration
from pomelo.providers.base import Event, Job
from pomelo.providers.sandbox import Sandbox
from pomelo.testing import Gate, Reply, Transcript
from pomelo.testing.audio import packets
from tests.app import Account, RunningApp, app_fixture, run_app
from tests.calls import bearer
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, PROTOCOLS
from tests.integration.leaving import LeavingClient
from tests.tasks import to_task

SECONDS = 30
AUDIO = {"Content-Type": "audio/mpeg"}


def wav(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, 2, rate, 0, "NONE", ""))
        tone = b"".join(struct.pack("<h", round(900 * math.sin(n / 7))) * channels for n in range(rate // 10))
        out.writeframes(tone * round(seconds * 10))
    return file.getvalue()


def opus(kbits: int, **options: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as out:
        stream: Any = out.add_stream("libopus", rate=48_000)
        stream.layout, stream.bit_rate, stream.options = "mono", kbits * 1000, options
        for number in range(SECONDS * 10):
            frame = av.AudioFrame(format="s16", layout="mono", samples=4_800)
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            frame.sample_rate, frame.pts, frame.time_base = 48_000, number * 4_800, Fraction(1, 48_000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def mp3(kbits: int, seconds: float = SECONDS) -> bytes:
    """MP3 frames of silence."""
    return b"".join(packets(f"mp3_44100_{kbits}", round(kbits * 125 * seconds), "seed"))


INPUT = wav(SECONDS)
ANSWERS: dict[str, tuple[str, bytes]] = {
    "mp3 of the requested rate": ("mp3_44100_128", mp3(128)),
    "mp3 of a quarter of the rate": ("mp3_44100_128", mp3(32)),
    "mp3 of four times the rate": ("mp3_22050_32", mp3(128)),
    "mp3 for opus": ("opus_48000_32", mp3(128)),
    "mp3 for samples": ("pcm_44100", mp3(128)),
    "opus of 6 kbit/s": ("opus_48000_128", opus(6)),
    "opus without packets for silence": ("opus_48000_64", opus(64, dtx="1")),
    "stereo for wav": ("wav_16000", wav(SECONDS, 44_100, 2)),
    "wav for samples": ("pcm_16000", wav(SECONDS, 44_100, 2)),
    "wav for mp3": ("mp3_44100_128", wav(SECONDS, 44_100)),
    "samples": ("pcm_16000", INPUT[44:]),
    "webm for opus": ("opus_48000_32", b"\x1aE\xdf\xa3" + bytes(20_000)),
}

ROUTES = """
[models.eleven-labs-sts-twice]
type = "speech_to_speech"
limits = { max_audio_seconds = 300 }
price = { audio_minute = "0.12" }
price_version = "2026-11-28"
[[models.eleven-labs-sts-twice.routes]]
provider = "elevenlabs"
model = "first"
[[models.eleven-labs-sts-twice.routes]]
provider = "elevenlabs"
model = "second"
drop = ["speed"]
"""

app = app_fixture()


def ask_sts(output_format: str, audio: bytes = INPUT, **more: Any) -> dict[str, Any]:
    """A speech-to-speech task."""
    return {
        "model": "eleven-labs-sts",
        "audio": base64.b64encode(audio).decode(),
        "voice": "adam",
        "output_format": output_format,
        **more,
    }


async def interrupt(
    app: RunningApp, protocol: str, caller: Account, body: dict[str, Any], sent: bytes
) -> None:
    """Requests a stream, and disconnects when the vendor has sent `sent` of its answer."""
    gate = Gate()
    headers = {"Content-Type": "audio/pcm" if body["output_format"].startswith("pcm") else "audio/mpeg"}
    app.upstream.script(Reply(headers=headers, steps=(sent, gate)))
    client = LeavingClient(app, protocol, caller.live, body, stream=True)
    await gate.reached.wait()
    await client.has_audio(len(sent))
    await client.leave()
    await app.idle(caller, live=True)


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("name", ANSWERS)
async def test_speech_to_speech_costs_its_input_in_any_format_of_the_answer(
    app: RunningApp, protocol: str, stream: bool, name: str
) -> None:
    output_format, answer = ANSWERS[name]
    caller = await app.account("wide", live=70_000)  # 0.07 credits: 35 s
    app.upstream.script(Reply(headers=AUDIO, steps=(answer,)))
    response = await app.ask(protocol, caller.live, ask_sts(output_format), stream=stream)
    assert (response.code, response.content.partition(" ")[0]) == ("ok", str(len(answer)))
    assert (await app.only_record(caller)).audio_ms == SECONDS * 1000


@PROTOCOL_AND_STREAM
async def test_an_answer_that_is_longer_than_its_input_costs_no_more_than_the_reservation(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    caller = await app.account("wide", live=70_000)
    app.upstream.script(Reply(headers=AUDIO, steps=(mp3(128, 165),)))
    response = await app.ask(protocol, caller.live, ask_sts("mp3_44100_128"), stream=stream)
    assert response.code == "ok"
    assert SECONDS * 1000 <= (await app.only_record(caller)).audio_ms <= SECONDS * 1020


@PROTOCOL
@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "webm for opus"])
async def test_interrupted_speech_to_speech_costs_the_delivered_half(
    app: RunningApp, protocol: str, name: str
) -> None:
    output_format, answer = ANSWERS[name]
    caller = await app.account("wide")
    await interrupt(app, protocol, caller, ask_sts(output_format), answer[: len(answer) // 2])
    (record,) = await app.records(caller)
    assert 0 < record.output_bytes <= len(answer) // 2
    delivered = SECONDS * 1000 * record.output_bytes / len(answer)
    assert (await app.only_record(caller)).audio_ms == pytest.approx(
        delivered, abs=1200
    )  # a page of Ogg is 1 s


@PROTOCOL
async def test_interrupted_speech_to_speech_that_cannot_be_measured_costs_its_input(
    app: RunningApp, protocol: str
) -> None:
    caller = await app.account("wide")
    await interrupt(app, protocol, caller, ask_sts("opus_48000_32"), ANSWERS["webm for opus"][1])
    assert (await app.only_record(caller)).audio_ms == SECONDS * 1000


@PROTOCOL
@pytest.mark.parametrize(("speed", "sent_speed"), [(0.7, 0.7), (1.2, 1.2), (4, 1.2), (0.25, 0.7)])
async def test_interrupted_speech_is_billed_at_the_speed_sent_to_the_vendor(
    app: RunningApp, protocol: str, speed: float, sent_speed: float
) -> None:
    settings: dict[str, Any] = {"voice_settings": {"speed": speed}}
    samples = bytes(10 * 32_000)
    caller = await app.account("wide")
    await interrupt(app, protocol, caller, ask_sts("pcm_16000", **settings), samples)
    assert (await app.only_record(caller)).audio_ms == pytest.approx(10_000 * sent_speed, abs=2)
    caller = await app.account("wide")
    text = {"model": "eleven-labs-tts", "text": "x" * 1000, "voice": "adam", "output_format": "pcm_16000"}
    await interrupt(app, protocol, caller, text | settings, samples)
    (record,) = await app.records(caller)
    assert record.characters == pytest.approx(150 * sent_speed, abs=1)


async def test_speech_of_a_second_route_is_billed_at_the_speed_that_this_route_got(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(ROUTES)
    unknown = bytes(range(250)) * 20  # it can't be measured, so the length of the answer decides
    body = ask_sts("pcm_16000", unknown, model="eleven-labs-sts-twice", voice_settings={"speed": 1.2})
    async with run_app(tmp_path, settings={"catalog": tmp_path / "own.toml"}) as app:
        for protocol in PROTOCOLS:
            for stream in (False, True):
                caller = await app.account("wide")
                refusal = Reply(401)
                app.upstream.script(refusal, Reply(headers=AUDIO, steps=(bytes(10 * 32_000),)))
                response = await app.ask(protocol, caller.live, body, stream=stream)
                assert response.code == "ok", response.message
                record = await app.only_record(caller)
                assert (record.provider_model, record.audio_ms) == ("second", 10_000)


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("speed", [0.25, 4])
@pytest.mark.parametrize("output_format", ["mp3_44100_128", "opus_48000_64", "wav_16000", "pcm_16000"])
async def test_the_speed_does_not_change_the_cost_of_a_complete_sandbox_answer(
    app: RunningApp, protocol: str, stream: bool, output_format: str, speed: float
) -> None:
    caller = await app.account("wide")
    body = ask_sts(output_format, wav(5), voice_settings={"speed": speed})
    assert (await app.ask(protocol, caller.test, body, stream=stream)).code == "ok"
    (record,) = await app.records(caller)
    assert (record.audio_ms, record.source) == (5000, "provider")


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    "output_format", ["mp3_44100_128", "opus_48000_64", "wav_16000", "pcm_16000", "ulaw_8000"]
)
async def test_an_answer_without_audio_costs_nothing(
    app: RunningApp, protocol: str, stream: bool, output_format: str
) -> None:
    words = b"Service temporarily unavailable, please retry"
    for answer in (words, b"\xef\xbb\xbf" + json.dumps({"error": "none"}).encode(), gzip.compress(words)):
        for body in (
            {"model": "eleven-labs-tts", "text": "Hello", "voice": "adam", "output_format": output_format},
            ask_sts(output_format),
        ):
            caller = await app.account("wide")
            app.upstream.script(Reply(headers=AUDIO, steps=(answer,)))
            response = await app.ask(protocol, caller.live, body, stream=stream)
            assert response.code == "provider_failed"
            assert "temporarily" not in response.message
            assert not await app.records(caller)
            assert (await app.balance(caller, live=True)).spent == 0


# --- transcripts

STT = {"model": "eleven-labs-stt", "audio": base64.b64encode(INPUT).decode()}


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    ("reported", "ms", "source"),
    [
        ("29.5", 29_500, "provider"),
        (29.5, 29_500, "provider"),
        ("abc", 30_000, "estimated"),
        (True, 30_000, "estimated"),
        ([30], 30_000, "estimated"),
        ({}, 30_000, "estimated"),
        (None, 30_000, "estimated"),
        (-1, 30_000, "estimated"),
        (10**400, 30_000, "estimated"),
        (float("nan"), 30_000, "estimated"),
        (float("inf"), 30_000, "estimated"),
        (31, 30_000, "estimated"),
    ],
)
async def test_a_transcript_costs_the_reported_length_or_the_measured_one(
    app: RunningApp,
    protocol: str,
    stream: bool,
    reported: Any,
    ms: int,
    source: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caller = await app.account("wide")
    words = [None, {"text": None}, {"text": "Hi", "start": "0.5", "end": None, "type": None, "speaker_id": 5}]
    app.upstream.script(Transcript("Hi", more={"audio_duration_secs": reported, "words": words}))
    answer = await app.ask(protocol, caller.live, STT, stream=stream)
    assert (answer.code, answer.content) == ("ok", "Hi")
    record = await app.only_record(caller)
    assert (record.audio_ms, record.source) == (ms, source)
    lines = [line.__dict__["fields"] for line in caplog.records if "s of audio that has" in line.getMessage()]
    assert bool(lines) == (reported == 31)
    for fields in lines:
        assert (fields["request_id"], fields["provider"]) == (record.request_id, record.provider)


@PROTOCOL
async def test_a_transcript_of_unknown_length_costs_the_maximum_length_not_its_last_word(
    app: RunningApp, protocol: str
) -> None:
    caller = await app.account("wide")
    words = [{"text": "Hi", "start": 0, "end": 0.1}]
    app.upstream.script(Transcript("Hi", more={"audio_duration_secs": None, "words": words}))
    body = STT | {"audio": base64.b64encode(b"no audio at all " * 100).decode()}
    assert (await app.ask(protocol, caller.live, body)).code == "ok"
    assert (await app.only_record(caller)).audio_ms == 1600 * 8


class _InvalidNumbers:
    """A plug-in that reports a length that is not finite, and offsets that are missing or no Durations."""

    configured = True
    seconds = 0.0

    async def speech_to_text(self, job: Job[SpeechToTextInput]) -> AsyncIterator[Event]:
        transcription = Transcription(text="Hi you", audio_seconds=self.seconds)
        for text, start, end in (
            ("Hi", Duration(nanos=500_000_000), Duration(seconds=1)),
            ("you", Duration(seconds=2**60), Duration(seconds=7, nanos=10**9)),
            ("all", Duration(seconds=-1, nanos=1), None),
        ):
            transcription.words.add(text=text, start_offset=start, end_offset=end)
        yield Event(completed=TaskResult(transcription=transcription))

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, 1e308, -1.0, 0.0])
async def test_lengths_and_offsets_that_are_not_valid_are_not_returned(
    tmp_path: Path, seconds: float
) -> None:
    provider = _InvalidNumbers()
    provider.seconds = seconds
    providers: Any = {"sandbox": Sandbox(), "elevenlabs": provider}
    async with run_app(tmp_path, providers=providers) as app:
        for protocol in PROTOCOLS:
            for stream in (False, True):
                caller = await app.account("wide")
                answer = await app.ask(protocol, caller.live, STT, stream=stream)
                assert (answer.code, answer.content) == ("ok", "Hi you")
                assert (await app.only_record(caller)).audio_ms == 30_000
        metadata = bearer(caller.live)
        tasks = TaskServiceStub(app.channel)
        result = (await tasks.RunTask(RunTaskRequest(spec=to_task(STT)), metadata=metadata)).result
        assert result.transcription.audio_seconds == 30
        expected_words = [
            (word.text, from_duration(word.start_offset), from_duration(word.end_offset))
            for word in result.transcription.words
        ]
        assert expected_words == [("Hi", 0.5, 1), ("you", 1, 1), ("all", 1, 1)]
        rest = await app.post("remote", caller.live, json=STT)
        words = json.loads(await rest.text(), parse_constant=_refuse_constant)["words"]
        assert [(word["text"], word["start"], word["end"]) for word in words] == expected_words


def _refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")
