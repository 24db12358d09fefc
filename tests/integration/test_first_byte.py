"""Streams are not buffered: a caller receives each chunk of a vendor before the vendor sends the next one.

The tests measure no time. The vendor waits at a gate after each of the first chunks; a gate opens only when
the caller has received everything that was sent before it. `bench/first_byte.py` measures the delay.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import ModuleType
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing import FaultUpstream, Gate, Speech, anthropic_protocol, mistral_protocol, openai_protocol
from tests.app import RunningApp, app_fixture
from tests.calls import bearer
from tests.tasks import text_body, to_task

GATES = 3
TIMEOUT = 20.0
"""Seconds after which a reader stops waiting for a chunk that was held back."""

AUDIO = base64.b64encode(b"OggS" + b"some audio " * 1000).decode()
TTS = {"model": "eleven-labs-tts", "text": "Hello, world, as it comes.", "voice": "adam"}
STS = {"model": "eleven-labs-sts", "audio": AUDIO, "voice": "adam"}

Chunks = AsyncGenerator[bytes, None]
Way = Callable[[Mapping[str, Any]], Chunks]


class Ways:
    """Yields the chunks of a response as they are received, over every protocol and gateway."""

    def __init__(
        self, session: aiohttp.ClientSession, channel: grpc.aio.Channel, key: str, rest: str, remote: str
    ) -> None:
        self._session = session
        self._tasks = TaskServiceStub(channel)
        self._key = key
        self.events: Mapping[str, Way] = {
            "rest": lambda body: self._events(rest, body),
            "remote": lambda body: self._events(remote, body),
            "grpc": self._grpc,
        }
        self.raw: Mapping[str, Way] = {
            "rest raw": lambda body: self._raw(rest, body),
            "remote raw": lambda body: self._raw(remote, body),
        }

    async def _events(self, url: str, body: Mapping[str, Any]) -> Chunks:
        async with self._post(url, {**body, "stream": True}) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "choices" in event:
                        yield event["choices"][0]["delta"].get("content", "").encode()
                    else:
                        yield base64.b64decode(event["audio"].get("b64_json", ""))

    async def _raw(self, url: str, body: Mapping[str, Any]) -> Chunks:
        async with self._post(url, body, Accept="audio/*") as answer:
            assert answer.status == 200, await answer.text()
            async for chunk in answer.content.iter_any():
                yield chunk

    async def _grpc(self, body: Mapping[str, Any]) -> Chunks:
        request = StreamTaskRequest(spec=to_task(body))
        async for response in self._tasks.StreamTask(request, metadata=bearer(self._key)):
            event = response.event
            yield event.audio_chunk.data or event.text_delta.text.encode()

    def _post(self, url: str, body: Mapping[str, Any], **headers: str) -> Any:
        headers = {"Authorization": f"Bearer {self._key}", **headers}
        return self._session.post(f"{url}/api/v1/task", json=body, headers=headers)


app = app_fixture(settings={"anthropic_api_key": "upstream"})


@pytest.fixture(scope="module")
async def ways(app: RunningApp) -> Ways:
    account = await app.account()
    return Ways(app.session, app.channel, account.live, app.urls["rest"], app.urls["remote"])


@pytest.fixture
def vendor(app: RunningApp) -> FaultUpstream:
    """The fault upstream without scripts or received requests."""
    app.upstream.reset()
    return app.upstream


class ObservedGate(Gate):
    """A gate that knows whether a response has passed it."""

    passed = False

    async def pass_through(self) -> None:
        await super().pass_through()
        self.passed = True


async def follow(chunks: Chunks, sent: list[bytes], gates: list[ObservedGate]) -> bytes:
    """Reads all chunks; opens each gate when everything sent before it was received. Returns the whole data.

    Raises:
        TimeoutError: a chunk was held back.
    """
    received, opened = b"", 0
    async with asyncio.timeout(TIMEOUT), aclosing(chunks):
        async for chunk in chunks:
            received += chunk
            while opened < len(gates) and received == b"".join(sent[: opened + 1]):
                assert not gates[opened].passed, "nothing was sent early"
                gates[opened].open()
                opened += 1
    assert opened == len(gates)
    return received


@pytest.mark.parametrize(
    "output_format", ["mp3_44100_128", "wav_44100", "opus_48000_64", "pcm_16000", "ulaw_8000"]
)
@pytest.mark.parametrize("body", [TTS, STS], ids=["text-to-speech", "speech-to-speech"])
@pytest.mark.parametrize("way", ["rest", "remote", "grpc", "rest raw", "remote raw"])
async def test_each_chunk_of_audio_is_received_before_the_next_is_sent(
    way: str, body: Mapping[str, Any], output_format: str, ways: Ways, vendor: FaultUpstream
) -> None:
    gates = [ObservedGate() for _ in range(GATES)]
    speech = Speech(size=100_000, at=dict(enumerate(gates, 1)))
    vendor.script(speech)
    chunks = {**ways.events, **ways.raw}[way]({**body, "output_format": output_format})
    whole = asyncio.create_task(follow(chunks, sent := [], gates))
    request = await vendor.received()
    sent += speech.audio(request)
    assert await whole == b"".join(sent)


@pytest.mark.parametrize(
    ("model", "vendor_api"),
    [("gpt-4", openai_protocol), ("claude-3-haiku", anthropic_protocol), ("mixtral-8x7b", mistral_protocol)],
)
@pytest.mark.parametrize("way", ["rest", "remote", "grpc"])
async def test_each_word_is_received_before_the_next_is_sent(
    way: str, model: str, vendor_api: ModuleType, ways: Ways, vendor: FaultUpstream
) -> None:
    gates = [ObservedGate() for _ in range(GATES)]
    vendor.script(vendor_api.Answer("one two three four", at=dict(enumerate(gates, 1))))
    chunks = ways.events[way](text_body("Count", model, max_tokens=9))
    assert await follow(chunks, [b"one", b" two", b" three"], gates) == b"one two three four"
