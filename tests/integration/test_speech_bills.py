"""What speech and transcripts cost, whatever the vendor answers, by each protocol, whole, streamed and left."""

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

from pomelo.gen.v1.speech_pb2 import Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.providers.base import Event, Job
from pomelo.providers.sandbox import Sandbox
from pomelo.testing import Gate, Reply, Transcript
from pomelo.testing.sound import packets
from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.integration.leaving import LeavingClient
from tests.tasks import to_task

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
SECONDS = 30
AUDIO = {"Content-Type": "audio/mpeg"}


def wav(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    """A faint tone."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, 2, rate, 0, "NONE", ""))
        tone = b"".join(struct.pack("<h", round(900 * math.sin(n / 7))) * channels for n in range(rate // 10))
        out.writeframes(tone * round(seconds * 10))
    return file.getvalue()


def opus(kbits: int, **options: str) -> bytes:
    """Silence in Ogg Opus."""
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
    """Frames of silence."""
    return b"".join(packets(f"mp3_44100_{kbits}", round(kbits * 125 * seconds), "seed"))


INPUT = wav(SECONDS)
ANSWERS: dict[str, tuple[str, bytes]] = {
    "mp3 of the asked rate": ("mp3_44100_128", mp3(128)),
    "mp3 of a quarter of the rate": ("mp3_44100_128", mp3(32)),
    "mp3 of four times the rate": ("mp3_22050_32", mp3(128)),
    "mp3 for opus": ("opus_48000_32", mp3(128)),
    "mp3 for samples": ("pcm_44100", mp3(128)),
    "opus of 6 kbit/s": ("opus_48000_128", opus(6)),
    "opus with silence left out": ("opus_48000_64", opus(64, dtx="1")),
    "stereo for wav": ("wav_16000", wav(SECONDS, 44_100, 2)),
    "wav for samples": ("pcm_16000", wav(SECONDS, 44_100, 2)),
    "wav for mp3": ("mp3_44100_128", wav(SECONDS, 44_100)),
    "samples": ("pcm_16000", INPUT[44:]),
    "webm for opus": ("opus_48000_32", b"\x1aE\xdf\xa3" + bytes(20_000)),
}


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("speech")) as opened:
        yield opened


def ask_sts(output_format: str, audio: bytes = INPUT, **more: Any) -> dict[str, Any]:
    """A speech-to-speech task."""
    return {
        "model": "eleven-labs-sts",
        "audio": base64.b64encode(audio).decode(),
        "voice": "adam",
        "output_format": output_format,
        **more,
    }


async def ms_billed(house: RunningApp, caller: Account) -> int:
    """Milliseconds of the one record; its cost is all that was charged, and nothing is left to collect."""
    (record,) = await house.records(caller)
    balance = await house.balance(caller, live=True)
    assert (balance.held, record.uncollected) == (0, 0)
    assert balance.spent == record.cost
    return record.audio_ms


async def leave(house: RunningApp, way: str, caller: Account, body: dict[str, Any], sent: bytes) -> None:
    """Asks for a stream, and leaves when the vendor has sent so much of its answer."""
    gate = Gate()
    headers = {"Content-Type": "audio/pcm" if body["output_format"].startswith("pcm") else "audio/mpeg"}
    house.upstream.script(Reply(headers=headers, steps=(sent, gate)))
    client = LeavingClient(house, way, caller.live, body, stream=True)
    await gate.reached.wait()
    await client.has(-(-len(sent) // 65_536))
    await client.leave()
    await house.idle(caller, live=True)


@WAY
@HOW
@pytest.mark.parametrize("name", ANSWERS)
async def test_speech_to_speech_costs_its_input_in_whatever_format_the_answer_is(
    house: RunningApp, way: str, stream: bool, name: str
) -> None:
    wanted, answer = ANSWERS[name]
    caller = await house.account("wide", live=70_000)  # 0.07 credits: 35 s
    house.upstream.script(Reply(headers=AUDIO, steps=(answer,)))
    told = await house.ask(way, caller.live, ask_sts(wanted), stream=stream)
    assert (told.code, told.content.partition(" ")[0]) == ("ok", str(len(answer)))
    assert await ms_billed(house, caller) == SECONDS * 1000


@WAY
@HOW
async def test_an_answer_that_is_longer_than_its_input_costs_no_more_than_was_held(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account("wide", live=70_000)
    house.upstream.script(Reply(headers=AUDIO, steps=(mp3(128, 165),)))
    told = await house.ask(way, caller.live, ask_sts("mp3_44100_128"), stream=stream)
    assert told.code == "ok"
    assert SECONDS * 1000 <= await ms_billed(house, caller) <= SECONDS * 1020


@WAY
@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "webm for opus"])
async def test_left_speech_to_speech_costs_the_delivered_half(house: RunningApp, way: str, name: str) -> None:
    wanted, answer = ANSWERS[name]
    caller = await house.account("wide")
    await leave(house, way, caller, ask_sts(wanted), answer[: len(answer) // 2])
    (record,) = await house.records(caller)
    assert 0 < record.output_bytes <= len(answer) // 2
    delivered = SECONDS * 1000 * record.output_bytes / len(answer)
    assert await ms_billed(house, caller) == pytest.approx(delivered, abs=1200)  # a page of Ogg is 1 s


@WAY
async def test_left_speech_to_speech_that_can_not_be_measured_costs_its_input(
    house: RunningApp, way: str
) -> None:
    caller = await house.account("wide")
    await leave(house, way, caller, ask_sts("opus_48000_32"), ANSWERS["webm for opus"][1])
    assert await ms_billed(house, caller) == SECONDS * 1000


@WAY
@pytest.mark.parametrize(("speed", "spoken"), [(0.7, 0.7), (1.2, 1.2), (4, 1.2), (0.25, 0.7)])
async def test_left_speech_is_billed_at_the_speed_that_the_vendor_got(
    house: RunningApp, way: str, speed: float, spoken: float
) -> None:
    settings = {"voice_settings": {"speed": speed}}
    samples = bytes(10 * 32_000)
    caller = await house.account("wide")
    await leave(house, way, caller, ask_sts("pcm_16000", **settings), samples)
    assert await ms_billed(house, caller) == pytest.approx(10_000 * spoken, abs=2)
    caller = await house.account("wide")
    text = {"model": "eleven-labs-tts", "text": "x" * 1000, "voice": "adam", "output_format": "pcm_16000"}
    await leave(house, way, caller, text | settings, samples)
    (record,) = await house.records(caller)
    assert record.characters == pytest.approx(150 * spoken, abs=1)


@WAY
@HOW
@pytest.mark.parametrize("speed", [0.25, 4])
@pytest.mark.parametrize("wanted", ["mp3_44100_128", "opus_48000_64", "wav_16000", "pcm_16000"])
async def test_the_speed_changes_no_whole_bill_of_the_sandbox(
    house: RunningApp, way: str, stream: bool, wanted: str, speed: float
) -> None:
    caller = await house.account("wide")
    body = ask_sts(wanted, wav(5), voice_settings={"speed": speed})
    assert (await house.ask(way, caller.test, body, stream=stream)).code == "ok"
    (record,) = await house.records(caller)
    assert (record.audio_ms, record.source) == (5000, "provider")


@WAY
@HOW
@pytest.mark.parametrize("wanted", ["mp3_44100_128", "opus_48000_64", "wav_16000", "pcm_16000", "ulaw_8000"])
async def test_what_is_no_audio_costs_nothing(house: RunningApp, way: str, stream: bool, wanted: str) -> None:
    words = b"Service temporarily unavailable, please retry"
    for answer in (words, b"\xef\xbb\xbf" + json.dumps({"error": "none"}).encode(), gzip.compress(words)):
        for body in (
            {"model": "eleven-labs-tts", "text": "Hello", "voice": "adam", "output_format": wanted},
            ask_sts(wanted),
        ):
            caller = await house.account("wide")
            house.upstream.script(Reply(headers=AUDIO, steps=(answer,)))
            told = await house.ask(way, caller.live, body, stream=stream)
            assert told.code == "provider_failed"
            assert "temporarily" not in told.message
            assert not await house.records(caller)
            assert (await house.balance(caller, live=True)).spent == 0


# --- transcripts

STT = {"model": "eleven-labs-stt", "audio": base64.b64encode(INPUT).decode()}


@WAY
@HOW
@pytest.mark.parametrize(
    ("told", "ms", "source"),
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
    house: RunningApp, way: str, stream: bool, told: Any, ms: int, source: str
) -> None:
    caller = await house.account("wide")
    odd = [None, {"text": None}, {"text": "Hi", "start": "0.5", "end": None, "type": None, "speaker_id": 5}]
    house.upstream.script(Transcript("Hi", more={"audio_duration_secs": told, "words": odd}))
    answer = await house.ask(way, caller.live, STT, stream=stream)
    assert (answer.code, answer.content) == ("ok", "Hi")
    assert await ms_billed(house, caller) == ms
    (record,) = await house.records(caller)
    assert record.source == source


@WAY
async def test_a_transcript_of_unknown_length_costs_its_bound_not_its_last_word(
    house: RunningApp, way: str
) -> None:
    caller = await house.account("wide")
    words = [{"text": "Hi", "start": 0, "end": 0.1}]
    house.upstream.script(Transcript("Hi", more={"audio_duration_secs": None, "words": words}))
    body = STT | {"audio": base64.b64encode(b"no audio at all " * 100).decode()}
    assert (await house.ask(way, caller.live, body)).code == "ok"
    assert await ms_billed(house, caller) == 1600 * 8


class _Odd:
    """A plug-in that reports lengths and times that are no numbers."""

    configured = True
    seconds = 0.0

    async def speech_to_text(self, job: Job) -> AsyncIterator[Event]:
        said = Transcription(text="Hi you", audio_seconds=self.seconds)
        said.words.add(text="Hi", start=0.5, end=1)
        said.words.add(text="you", start=math.nan, end=math.inf)
        yield Event(result=TaskResult(transcription=said))

    async def aclose(self) -> None:
        """See Provider."""


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, 1e308, -1.0, 0.0])
async def test_lengths_and_times_that_are_no_numbers_are_not_passed_on(
    tmp_path: Path, seconds: float
) -> None:
    odd = _Odd()
    odd.seconds = seconds
    providers: Any = {"sandbox": Sandbox(), "elevenlabs": odd}
    async with run_app(tmp_path, providers=providers) as house:
        for way in PROTOCOLS:
            for stream in (False, True):
                caller = await house.account("wide")
                answer = await house.ask(way, caller.live, STT, stream=stream)
                assert (answer.code, answer.content) == ("ok", "Hi you")
                assert await ms_billed(house, caller) == 30_000
        metadata = [("authorization", f"Bearer {caller.live}")]
        tasks = TaskServiceStub(house.channel)
        said = (await tasks.RunTask(RunTaskRequest(task=to_task(STT)), metadata=metadata)).result
        assert said.transcription.audio_seconds == 30
        heard = [(word.text, word.start, word.end) for word in said.transcription.words]
        assert heard == [("Hi", 0.5, 1), ("you", 1, 1)]
        url = f"{house.urls['remote']}/api/v1/task"
        async with house.session.post(url, json=STT, headers={"Authorization": metadata[0][1]}) as got:
            words = json.loads(await got.text(), parse_constant=_no_number)["words"]
        assert [(word["text"], word["start"], word["end"]) for word in words] == heard


def _no_number(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")
