"""Callers who leave and deadlines that pass at any point of an answer: only delivered output is billed, once."""

from __future__ import annotations

import asyncio
import json
from statistics import median

import grpc
import pytest
from yarl import URL

from pomelo.catalog.pricing import Usage, cost, decode_prices
from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.server.remote import channel
from pomelo.stores.usage import UsageRecord
from pomelo.testing import Answer, Gate, Received, Speech
from tests.app import Account, RunningApp, app_fixture
from tests.calls import bearer
from tests.driver import PROTOCOL, STREAM
from tests.integration.leaving import LeavingClient
from tests.tasks import text_body, to_task

WORDS = "one two three four five six"
POINTS = {
    "before the headers": None,
    "after the headers": 0,
    "after the first word": 1,
    "in the middle": 3,
    "just before the end": 6,
}
"""Point at which the vendor waits -> the words before it; None: before the headers."""
POINT = pytest.mark.parametrize("words", POINTS.values(), ids=POINTS)

MAX_SECONDS = 1.0
"""Seconds after a caller leaves until its concurrency slot is free, and until the vendor sees it."""


app = app_fixture()


def wait(app: RunningApp, prompt: str, words: int | None) -> Gate:
    """Makes the vendor wait after that many words of its answer to a prompt; None: before its headers."""
    gate = Gate()
    before, at = ((gate,), {}) if words is None else ((), {words: gate})
    app.upstream.when(prompt, Answer(WORDS, before=before, at=at))
    return gate


def received(app: RunningApp, prompt: str) -> Received:
    """Returns the one request with a prompt that reached the vendor."""
    (request,) = [r for r in app.upstream.requests if prompt in r.prompt]
    return request


def cost_of(record: UsageRecord) -> int:
    """Returns the cost of a record's counts at its own prices."""
    used = Usage(record.input_tokens, record.output_tokens, record.characters, audio_ms=record.audio_ms)
    return cost(used, decode_prices(record.prices))


async def check_billed(app: RunningApp, account: Account, words: int | None, *, stream: bool) -> None:
    """Asserts that the delivered words are charged once, and that nothing is reserved."""
    balance = await app.balance(account, live=True)
    records = await app.records(account)
    assert balance.held == 0
    if not stream or not words:
        assert not records
        assert balance.spent == 0
        return
    (record,) = records
    assert not record.complete
    assert record.source == "estimated"
    assert record.output_tokens == words
    assert record.provider == "openai"
    assert record.output_bytes == len(" ".join(WORDS.split()[:words]))
    assert record.cost == cost_of(record) == balance.spent > 0


@PROTOCOL
@STREAM
@POINT
async def test_a_caller_who_leaves_pays_for_what_was_delivered(
    app: RunningApp, words: int | None, protocol: str, stream: bool
) -> None:
    account = await app.account("wide")
    prompt = f"leave at {words}: {protocol} {stream}"
    gate = wait(app, prompt, words)
    client = LeavingClient(app, protocol, account.live, text_body(prompt, max_tokens=50), stream=stream)
    await gate.reached.wait()
    if stream:
        await client.has(words or 0)
    assert await app.concurrency(account, live=True) == 1
    await client.leave()
    await app.idle(account, live=True)
    async with asyncio.timeout(20):
        await received(app, prompt).left.wait()
    await check_billed(app, account, words, stream=stream)


@pytest.mark.parametrize("protocol", ["rest", "remote"])
async def test_a_caller_who_shuts_down_its_side_of_the_connection_has_left(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("wide")
    prompt = f"half-closed: {protocol}"
    gate = wait(app, prompt, None)
    url = URL(app.urls[protocol])
    body = json.dumps(text_body(prompt, max_tokens=50))
    head = (
        f"POST /api/v1/task HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {account.live}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"{head}{body}".encode())
    await gate.reached.wait()
    writer.write_eof()
    async with asyncio.timeout(20):
        assert await reader.read() == b""
        await received(app, prompt).left.wait()
    writer.close()
    await app.idle(account, live=True)
    await check_billed(app, account, None, stream=False)


@PROTOCOL
async def test_a_deadline_bills_what_was_delivered(
    app: RunningApp, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All points concurrently, because each lasts until its deadline."""
    # The machine may be busy: a gateway waits for the server to report the deadline.
    monkeypatch.setattr(channel, "_GRACE", 20.0)

    async def check(words: int | None, *, stream: bool) -> None:
        account = await app.account("wide")
        prompt = f"late at {words}: {protocol} {stream}"
        wait(app, prompt, words)
        body = text_body(prompt, max_tokens=50)
        outcome = await app.ask(protocol, account.live, body, stream=stream, within=3)
        assert outcome.code == "deadline_exceeded", prompt
        assert not outcome.done, prompt
        await app.idle(account, live=True)
        async with asyncio.timeout(20):
            await received(app, prompt).left.wait()
        await check_billed(app, account, words, stream=stream)
        if protocol != "grpc" and not (stream and words):  # a stream's headers were sent before
            assert outcome.headers["x-credits-charged"] == "0", prompt

    await asyncio.gather(
        *(check(words, stream=stream) for words in POINTS.values() for stream in (False, True))
    )


@PROTOCOL
async def test_a_caller_who_leaves_speech_pays_for_the_delivered_time(app: RunningApp, protocol: str) -> None:
    account = await app.account("wide")
    text = "Speech of some length that is not received completely. " * 4
    body = {"model": "eleven-labs-tts", "text": text, "voice": "adam", "output_format": "pcm_16000"}
    gate = Gate()
    before = len(app.upstream.requests)
    app.upstream.script(Speech(at={2: gate}))
    client = LeavingClient(app, protocol, account.live, body, stream=True)
    await gate.reached.wait()
    await client.has(1)
    await client.leave()
    await app.idle(account, live=True)
    (record,) = await app.records(account)
    assert not record.complete
    assert 0 < record.characters <= -(-record.output_bytes * 15 // 32_000)
    assert record.cost == cost_of(record) == (await app.balance(account, live=True)).spent
    assert len(app.upstream.requests) > before


@PROTOCOL
async def test_a_caller_who_leaves_an_image_pays_nothing(app: RunningApp, protocol: str) -> None:
    account = await app.account("wide")
    body = {"model": "flux-1-pro", "prompt": "[[stall]] a kite", "width": 96, "height": 64}
    client = LeavingClient(app, protocol, account.test, body, stream=True)
    async with asyncio.timeout(20):
        while not await app.concurrency(account):
            pass
    await client.leave()
    await app.idle(account)
    assert (await app.balance(account)).spent == 0
    assert not await app.records(account)


@PROTOCOL
async def test_an_answer_cut_by_the_vendor_costs_the_delivered_words(app: RunningApp, protocol: str) -> None:
    account = await app.account("wide")
    outcome = await app.ask(protocol, account.test, text_body("[[words:20]] [[cut]]"), stream=True)
    assert outcome.code == "provider_failed"
    (record,) = await app.records(account)
    assert (record.output_tokens, record.complete) == (10, False)
    assert record.cost == cost_of(record) == (await app.balance(account)).spent
    if protocol == "grpc":
        assert float(outcome.trailers["x-credits-charged"]) * 10**6 == pytest.approx(record.cost)


@PROTOCOL
@STREAM
async def test_leaving_frees_the_slot_and_closes_the_upstream_call_within_a_tenth_of_a_second(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    # The median of several callers, because the machine may be busy with something else.
    account = await app.account("wide")
    release_times, upstream = [], []
    for number in range(15):
        prompt = f"again {protocol} {stream} {number}."
        gate = wait(app, prompt, 1)
        client = LeavingClient(app, protocol, account.live, text_body(prompt, max_tokens=5), stream=stream)
        async with asyncio.timeout(20):
            await gate.reached.wait()
        left = asyncio.get_running_loop().time()
        await client.leave()
        await app.idle(account, live=True)
        release_times.append(asyncio.get_running_loop().time() - left)
        request = received(app, prompt)
        async with asyncio.timeout(20):
            await request.left.wait()
        assert request.left_at is not None
        upstream.append(request.left_at - left)
    assert median(release_times) < MAX_SECONDS
    assert median(upstream) < MAX_SECONDS


async def test_a_broken_connection_counts_as_a_caller_who_left(app: RunningApp) -> None:
    account = await app.account("wide")
    prompt = "the channel closes"
    wait(app, prompt, 2)
    assert app.server.grpc is not None
    channel = grpc.aio.insecure_channel(app.server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
    task = to_task(text_body(prompt, max_tokens=20))
    stream = TaskServiceStub(channel).StreamTask
    call = stream(StreamTaskRequest(spec=task), metadata=bearer(account.live))
    for _ in range(3):  # the start, and two words
        await call.read()
    await channel.close()
    await app.idle(account, live=True)
    await check_billed(app, account, 2, stream=True)
