"""Callers who leave, and deadlines, wherever the answer is: what was delivered is billed, once, and all else is free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from statistics import median
from typing import Any

import grpc
import pytest

from pomelo.catalog.pricing import Usage, cost, decode_prices
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.stores.ledger import UsageRecord
from pomelo.testing import Answer, Gate, Received, Speech
from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.tasks import text_body, to_task

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
WORDS = "one two three four five six"
PLACES: dict[str, tuple[dict[str, Any], int]] = {
    "before the head": ({"before": True}, 0),
    "after the head": ({"at": 0}, 0),
    "after the first piece": ({"at": 1}, 1),
    "in the middle": ({"at": 3}, 3),
    "just before the end": ({"at": 6}, 6),
}
"""Where the vendor waits, and the pieces that the caller has by then of a stream."""

WITHIN = 0.1
"""Seconds from a caller's leaving until its slot is free, and until the vendor has seen it."""


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("leaving")) as opened:
        yield opened


class Client:
    """One caller who reads pieces and leaves when told to."""

    def __init__(self, house: RunningApp, way: str, key: str, body: dict[str, Any], *, stream: bool) -> None:
        self.pieces = 0
        self.content = ""
        self._heard = asyncio.Condition()
        self._stream = stream
        run: Callable[[], Awaitable[None]] = self._grpc if way == "grpc" else self._rest
        self._house, self._way, self._key, self._body = house, way, key, body
        self.task = asyncio.ensure_future(run())

    async def has(self, pieces: int) -> None:
        """Returns when so many pieces have come."""
        async with asyncio.timeout(5), self._heard:
            await self._heard.wait_for(lambda: self.pieces >= pieces)

    async def leave(self) -> None:
        """Goes away, in the middle of whatever it is."""
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task

    async def _took(self, content: str) -> None:
        async with self._heard:
            self.pieces += 1
            self.content += content
            self._heard.notify_all()

    async def _grpc(self) -> None:
        tasks = TaskServiceStub(self._house.channel)
        given: dict[str, Any] = {"metadata": [("authorization", f"Bearer {self._key}")]}
        task = to_task(self._body)
        if not self._stream:
            await tasks.RunTask(RunTaskRequest(task=task), **given)
            return
        call = tasks.StreamTask(StreamTaskRequest(task=task), **given)
        try:
            async for event in call:
                if event.text_delta.content or event.audio_chunk.data:
                    await self._took(event.text_delta.content)
        finally:
            call.cancel()

    async def _rest(self) -> None:
        headers = {"Authorization": f"Bearer {self._key}"}
        url = f"{self._house.urls[self._way]}/api/v1/task"
        body = self._body | {"stream": self._stream}
        async with self._house.session.post(url, json=body, headers=headers) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    await self._took("")


async def free(house: RunningApp, caller: Account, *, live: bool = True) -> float:
    """Waits until no slot is taken; seconds that it took."""
    began = time.monotonic()
    async with asyncio.timeout(5):
        while await house.concurrency(caller, live=live):
            pass
    return time.monotonic() - began


def received(house: RunningApp, prompt: str) -> Received:
    """The one request of a prompt that reached the vendor."""
    (request,) = [r for r in house.upstream.requests if prompt in r.prompt]
    return request


def counted(record: UsageRecord) -> int:
    """What a record's counts cost by its own prices."""
    used = Usage(record.input_tokens, record.output_tokens, record.characters, audio_ms=record.audio_ms)
    return cost(used, decode_prices(record.prices))


async def check_billed(
    house: RunningApp, caller: Account, pieces: int, *, stream: bool, provider: str = "openai"
) -> None:
    """What was delivered is charged, once; nothing is held."""
    balance = await house.balance(caller, live=True)
    records = await house.records(caller)
    assert balance.held == 0
    if not stream or not pieces:
        assert not records
        assert balance.spent == 0
        return
    (record,) = records
    assert not record.complete
    assert record.source == "estimated"
    assert record.output_tokens == pieces
    assert record.provider == provider
    assert record.output_bytes == len(" ".join(WORDS.split()[:pieces]))
    assert record.cost == counted(record) == balance.spent > 0


@WAY
@HOW
@pytest.mark.parametrize("place", PLACES)
async def test_a_caller_who_leaves_pays_for_what_was_delivered(
    house: RunningApp, place: str, way: str, stream: bool
) -> None:
    where, pieces = PLACES[place]
    caller = await house.account("wide")
    prompt = f"leave {place} {way} {stream}"
    gate = Gate()
    waits: dict[str, Any] = {"before": (gate,)} if "before" in where else {"at": {where["at"]: gate}}
    house.upstream.when(prompt, Answer(WORDS, **waits))
    client = Client(house, way, caller.live, text_body(prompt, max_tokens=50), stream=stream)
    await gate.reached.wait()
    if stream:
        await client.has(pieces)
    assert await house.concurrency(caller, live=True) == 1
    await client.leave()
    await free(house, caller)
    async with asyncio.timeout(5):
        await received(house, prompt).left.wait()
    await check_billed(house, caller, pieces, stream=stream)


@WAY
@HOW
@pytest.mark.parametrize("place", PLACES)
async def test_a_deadline_bills_what_was_delivered(
    house: RunningApp, place: str, way: str, stream: bool
) -> None:
    where, pieces = PLACES[place]
    caller = await house.account("wide")
    prompt = f"late {place} {way} {stream}"
    gate = Gate()
    waits: dict[str, Any] = {"before": (gate,)} if "before" in where else {"at": {where["at"]: gate}}
    house.upstream.when(prompt, Answer(WORDS, **waits))
    told = await house.ask(way, caller.live, text_body(prompt, max_tokens=50), stream=stream, within=0.6)
    assert told.code == "deadline_exceeded"
    assert not told.done
    await free(house, caller)
    async with asyncio.timeout(1):
        await received(house, prompt).left.wait()
    await check_billed(house, caller, pieces, stream=stream)
    if way != "grpc" and not (stream and pieces):  # a stream's head has gone by then
        assert told.headers["x-credits-charged"] == "0"


@WAY
async def test_who_leaves_a_sound_pays_for_the_time_that_came(house: RunningApp, way: str) -> None:
    caller = await house.account("wide")
    text = "A sound of some length, of which not all is heard. " * 4
    body = {"model": "eleven-labs-tts", "text": text, "voice": "adam", "output_format": "pcm_16000"}
    gate = Gate()
    before = len(house.upstream.requests)
    house.upstream.script(Speech(at={2: gate}))
    client = Client(house, way, caller.live, body, stream=True)
    await gate.reached.wait()
    await client.has(1)
    await client.leave()
    await free(house, caller)
    (record,) = await house.records(caller)
    assert not record.complete
    assert 0 < record.characters <= -(-record.output_bytes * 15 // 32_000)
    assert record.cost == counted(record) == (await house.balance(caller, live=True)).spent
    assert len(house.upstream.requests) > before


@WAY
async def test_who_leaves_a_picture_pays_nothing(house: RunningApp, way: str) -> None:
    caller = await house.account("wide")
    body = {"model": "flux-1-pro", "prompt": "[[stall]] a kite", "width": 96, "height": 64}
    client = Client(house, way, caller.test, body, stream=True)
    async with asyncio.timeout(5):
        while not await house.concurrency(caller):
            pass
    await client.leave()
    await free(house, caller, live=False)
    assert (await house.balance(caller)).spent == 0
    assert not await house.records(caller)


@WAY
async def test_an_answer_that_is_cut_by_the_vendor_costs_what_came(house: RunningApp, way: str) -> None:
    caller = await house.account("wide")
    told = await house.ask(way, caller.test, text_body("[[words:20]] [[cut]]"), stream=True)
    assert told.code == "provider_failed"
    (record,) = await house.records(caller)
    assert (record.output_tokens, record.complete) == (10, False)
    assert record.cost == counted(record) == (await house.balance(caller)).spent
    if way == "grpc":
        assert float(told.trailers["x-credits-charged"]) * 10**6 == pytest.approx(record.cost)


@WAY
@HOW
async def test_a_slot_is_free_and_the_vendor_left_within_a_tenth_of_a_second(
    house: RunningApp, way: str, stream: bool
) -> None:
    """In the median of those who leave one after another: the machine may be busy with something else."""
    caller = await house.account("wide")
    slots, upstream = [], []
    for number in range(15):
        prompt = f"again {way} {stream} {number}."
        gate = Gate()
        house.upstream.when(prompt, Answer(WORDS, at={1: gate}))
        client = Client(house, way, caller.live, text_body(prompt, max_tokens=5), stream=stream)
        async with asyncio.timeout(5):
            await gate.reached.wait()
        left = asyncio.get_running_loop().time()
        await client.leave()
        slots.append(await free(house, caller))
        request = received(house, prompt)
        async with asyncio.timeout(5):
            await request.left.wait()
        assert request.left_at is not None
        upstream.append(request.left_at - left)
    assert median(slots) < WITHIN
    assert median(upstream) < WITHIN


async def test_a_connection_that_breaks_is_a_caller_who_left(house: RunningApp) -> None:
    caller = await house.account("wide")
    prompt = "the channel goes away"
    gate = Gate()
    house.upstream.when(prompt, Answer(WORDS, at={2: gate}))
    assert house.server.grpc is not None
    channel = grpc.aio.insecure_channel(house.server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
    task = to_task(text_body(prompt, max_tokens=20))
    metadata = [("authorization", f"Bearer {caller.live}")]
    call = TaskServiceStub(channel).StreamTask(StreamTaskRequest(task=task), metadata=metadata)
    for _ in range(3):  # started, and two words
        await call.read()
    await channel.close()
    await free(house, caller)
    await check_billed(house, caller, 2, stream=True)
