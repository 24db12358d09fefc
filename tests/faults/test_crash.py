"""A server that is killed: all acknowledged tasks are in the books, and the books add up to the microcredit.

SIGKILL at every point of a task's life, and at random times during many streams. `make crash` runs all
repetitions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pomelo.testing import Answer, FaultUpstream, Gate, Received, Reply, Script, Speech, error_reply
from tests.faults.callers import GONE, Grpc, Rest, Told, Watch, callers
from tests.faults.house import RESOLVED_WITHIN, Books, House, Process, read_books
from tests.redis_server import RedisServer

log = logging.getLogger("tests.crash")

FULL = os.environ.get("CRASH") == "full"
TIMES = 20 if FULL else 1
"""Number of crashes at each point."""
KILLS = {"sqlite": 50 if FULL else 2, "redis": 20 if FULL else 1}
STREAMS = 200 if FULL else 50
"""Number of running streams at each kill."""

CREDITS = 10**12
WORDS = "one two three four five six"


@dataclass(frozen=True)
class Point:
    """A point where a task's server dies. `streams`: only streams reach it; `text`: only text tasks do.
    `settled`: the complete task is in the books then. `noted`: its delivered output is."""

    streams: bool = False
    text: bool = False
    settled: bool = False
    noted: bool = False


POINTS = {
    "before_reserve": Point(),
    "in_reserve": Point(),
    "after_reserve": Point(),
    "before_the_provider": Point(),
    "at_the_first_piece": Point(),
    "between_pieces": Point(streams=True, text=True),
    "before_note": Point(streams=True),
    "after_note": Point(streams=True, noted=True),
    "in_recovery": Point(streams=True, noted=True),
    "at_the_end": Point(),
    "before_settle": Point(),
    "in_settle_before_the_charge": Point(),
    "in_settle_before_the_record": Point(),
    "in_settle_before_the_commit": Point(),
    "after_settle": Point(settled=True),
    "after_the_answer": Point(settled=True),
    "before_void": Point(text=True),
    "in_void": Point(text=True),
    "after_void": Point(text=True),
}


class Vendor:
    """The answers of the vendors, by the request id in the text; by default WORDS or audio."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.calls: Counter[str] = Counter()

    def __call__(self, received: Received) -> Reply:
        """The reply to a request."""
        request_id = id_in(received)
        self.calls[request_id] += 1
        script = self.scripts.get(request_id)
        if script is None:
            script = Answer(WORDS) if "messages" in received.body else Speech()
        return script if isinstance(script, Reply) else script(received)


def id_in(received: Received) -> str:
    """The request id of Pomelo's caller: the first word of its text."""
    prompt = received.prompt if "messages" in received.body else received.body["text"]
    return str(prompt).split()[0]


def text(request_id: str) -> dict[str, Any]:
    """A text task."""
    return {"model": "gpt-4", "messages": [{"role": "user", "content": f"{request_id} Count, please."}]}


def speech(request_id: str) -> dict[str, Any]:
    """A speech task."""
    return {"model": "eleven-labs-tts", "text": f"{request_id} Count, please. " + "la " * 20, "voice": "adam"}


@pytest.fixture
async def vendor(upstream: FaultUpstream) -> AsyncIterator[Vendor]:
    """Sets the answers of the fake vendors."""
    upstream.reset()
    upstream.default = answers = Vendor()
    yield answers
    upstream.default = None
    upstream.reset()


def emitted(upstream: FaultUpstream) -> Counter[str]:
    """The tokens that the vendor has sent, by request id."""
    sent: Counter[str] = Counter()
    for received in upstream.requests:
        sent[id_in(received)] += received.tokens_sent
    return sent


def check_received(books: Books, told: Told, sent: Mapping[str, int]) -> None:
    """A completed task is in the books, once; any other one with no more output than was sent."""
    records = books.records.get(told.request_id, [])
    assert len(records) <= 1, records
    if told.whole:
        (record,) = records
        assert record["complete"]
        assert record["task_id"] == told.task_id
        if told.usage is not None:
            assert (record["input_tokens"], record["output_tokens"]) == told.usage
        else:
            assert record["characters"] == len(told.body["text"])
    for record in records:
        assert record["uncollected"] == 0
        assert record["complete"] or record["output_tokens"] <= sent[told.request_id]
        assert record["characters"] <= len(told.body.get("text", ""))
        assert record["complete"] == (record["source"] != "recovered")


# --- at each point


@dataclass
class Round:
    """One crash, and what its callers received."""

    point: str
    number: int
    began: float = field(default_factory=time.time)
    told: list[Told] = field(default_factory=list)

    @property
    def dying(self) -> str:
        """The request id of the task whose server dies."""
        point = "after_note" if self.point == "in_recovery" else self.point
        return f"crash.{point}.{self.name}"

    @property
    def name(self) -> str:
        """A unique name."""
        return f"{self.point}.{self.number}"

    def body(self) -> tuple[dict[str, Any], bool]:
        """The task whose server dies, and whether it is a stream; in turn each type that reaches the
        point."""
        point = POINTS[self.point]
        turn = (self.number + list(POINTS).index(self.point)) // 2
        make = text if point.text or turn % 2 == 0 else speech
        return make(self.dying), point.streams or turn % 4 < 2


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory, upstream: FaultUpstream) -> AsyncIterator[House]:
    """One data folder for all crashes: each starts with what the last one left."""
    async with await House(tmp_path_factory.mktemp("house"), upstream).prepare(CREDITS) as lasting:
        yield lasting


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_at_any_point_loses_nothing_and_charges_nothing_twice(
    point: str, house: House, upstream: FaultUpstream, vendor: Vendor
) -> None:
    waits = []
    for number in range(TIMES):
        process = await house.running()
        round_ = Round(point, number)
        async with callers(process.rest, process.grpc, house.key) as clients:
            await crash(round_, clients, process, vendor)
        process = await restart(house, point)
        books = await read_books(process, round_.began)
        waits.append(time.monotonic() - process.started)
        books.check_idle()
        check(round_, books, emitted(upstream))
        vendor.scripts.clear()
        async with callers(process.rest, process.grpc, house.key) as clients:
            await check_repeat(round_, clients, process, vendor)
        upstream.requests.clear()
    assert max(waits) < RESOLVED_WITHIN
    log.info("%-28s %3d crashes, nothing reserved %.2f s after the restart at most", point, TIMES, max(waits))


async def crash(round_: Round, clients: tuple[Rest, Grpc], process: Process, vendor: Vendor) -> None:
    """Runs tasks until the server dies at the point: two that end, two that are running, and the dying
    one."""
    rest, grpc = clients
    name = round_.name
    round_.told += [
        await rest(text(f"done.rest.{name}"), f"done.rest.{name}"),
        await grpc(speech(f"done.grpc.{name}"), f"done.grpc.{name}", stream=True),
    ]
    assert all(told.whole for told in round_.told)
    watch = Watch()
    live = []
    for client, request_id in ((rest, f"live.rest.{name}"), (grpc, f"live.grpc.{name}")):
        vendor.scripts[request_id] = Answer(WORDS, at={2: Gate()})
        live.append(asyncio.create_task(client(text(request_id), request_id, stream=True, piece=watch.came)))
    await watch.reaches(4)
    body, stream = round_.body()
    if "note" in round_.dying:
        vendor.scripts[round_.dying] = (
            Speech(at={2: Gate()}) if "text" in body else Answer(WORDS, at={2: Gate()})
        )
    elif "void" in round_.point:
        vendor.scripts[round_.dying] = error_reply(400)
    last = await clients[round_.number % 2](body, round_.dying, stream=stream, repeat_key=round_.dying)
    if round_.point == "after_the_answer":
        assert last.whole
        process.kill()
    assert await process.ended() == -signal.SIGKILL
    round_.told += [last, *await asyncio.gather(*live)]
    assert [told.code for told in round_.told[-2:]] == [GONE, GONE]
    assert [told.pieces for told in round_.told[-2:]] == [2, 2]


async def restart(house: House, point: str) -> Process:
    """Starts a new server on the same data folder; at `in_recovery`, after one that dies while it
    recovers."""
    if point == "in_recovery":
        dead = await house.start(fails=True, DIE_IN_RECOVERY="1")
        assert dead.process.returncode == -signal.SIGKILL
    return await house.start()


def check(round_: Round, books: Books, sent: Mapping[str, int]) -> None:
    """All that callers received is in the books, and the dying task as its point requires."""
    for told in round_.told:
        check_received(books, told, sent)
    assert set(books.records) <= {told.request_id for told in round_.told}
    point = POINTS[round_.point]
    records = books.records.get(round_.dying, [])
    assert any(record["complete"] for record in records) == point.settled
    if point.noted:
        for client in ("rest", "grpc"):
            (record,) = books.records[f"live.{client}.{round_.name}"]
            assert (record["source"], record["output_tokens"]) == ("recovered", 2)
        (record,) = records
        assert record["source"] == "recovered"
        assert record["cost"] > 0


async def check_repeat(round_: Round, clients: tuple[Rest, Grpc], process: Process, vendor: Vendor) -> None:
    """A repeated request with the same Idempotency-Key is answered, and was charged once."""
    body, stream = round_.body()
    again = f"again.{round_.name}"
    calls = vendor.calls[round_.dying]
    told = await clients[(round_.number + 1) % 2](body, again, stream=stream, repeat_key=round_.dying)
    assert told.whole, told
    books = await read_books(process, round_.began)
    books.check_idle()
    settled = POINTS[round_.point].settled
    both = books.records.get(round_.dying, []) + books.records.get(again, [])
    (complete,) = [record for record in both if record["complete"]]
    assert told.task_id == complete["task_id"]
    assert complete["request_id"] == (round_.dying if settled else again)
    assert vendor.calls[round_.dying] == calls + (not settled)
    if settled:
        assert told.headers["x-credits-charged"] == "0"


# --- at any moment


@pytest.fixture(params=KILLS)
def kills(request: pytest.FixtureRequest) -> Iterator[tuple[int, dict[str, str]]]:
    """How often the server is killed, and the environment variables of its store."""
    if request.param == "sqlite":
        yield KILLS["sqlite"], {}
        return
    with RedisServer() as server:
        yield KILLS["redis"], {"POMELO_STORE": server.url}


async def resolved(process: Process, since: float) -> Books:
    """The books, as soon as nothing is reserved any more."""
    async with asyncio.timeout(2 * RESOLVED_WITHIN):
        while (await read_books(process, since)).held:  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(0.1)
    return await read_books(process, since)


@pytest.mark.timeout(3000 if FULL else 120)
async def test_a_server_killed_during_many_streams_loses_nothing(
    kills: tuple[int, dict[str, str]], tmp_path: Path, upstream: FaultUpstream, vendor: Vendor
) -> None:
    times, store = kills
    generator = random.Random(20261124)
    complete, cut, recovered = 0, 0, 0
    unbilled: list[int] = []
    waits: list[float] = []
    async with await House(tmp_path, upstream, **store).prepare(CREDITS) as house:
        process = await house.start()
        for number in range(times):
            began = time.time()
            watch = Watch()
            async with callers(process.rest, process.grpc, house.key, at_once=STREAMS // 2) as clients:
                living = [
                    asyncio.create_task(
                        until_the_end(clients[one % 2], f"{number}.{one}", vendor, watch, generator)
                    )
                    for one in range(STREAMS)
                ]
                await watch.reaches(STREAMS * 4 + generator.randrange(STREAMS * 20))
                process.kill()
                await process.ended()
                told = [one for many in await asyncio.gather(*living) for one in many]
            process = await house.start()
            books = await resolved(process, began)
            waits.append(time.monotonic() - process.started)
            books.check_idle()
            sent = emitted(upstream)
            for one in told:
                check_received(books, one, sent)
            assert set(books.records) <= {one.request_id for one in told}
            last = [one for one in told if not one.whole]
            assert len(last) == STREAMS
            assert {one.code for one in last} == {GONE}
            for one in last:
                billed = sum(record["output_tokens"] for record in books.records.get(one.request_id, ()))
                recovered += one.request_id in books.records
                unbilled.append(max(0, one.pieces - billed))
            complete += len(told) - len(last)
            cut += len(last)
            upstream.requests.clear()
            vendor.scripts.clear()
    assert max(waits) < RESOLVED_WITHIN
    unbilled.sort()
    log.info(
        "%s: %d kills during %d streams: %d acknowledged, none lost; %d cut off, %d of them charged; delivered words "
        "that were not charged: p50 %d, p99 %d, max %d (a word every %.2f s); nothing reserved p50 %.2f s, max %.2f s "
        "after the restart",
        "Redis" if store else "SQLite", times, STREAMS, complete, cut, recovered,
        unbilled[len(unbilled) // 2], unbilled[len(unbilled) * 99 // 100], unbilled[-1], PACE,
        sorted(waits)[len(waits) // 2], max(waits),
    )  # fmt: skip


PACE = 0.15
"""Seconds between two words."""


async def until_the_end(
    client: Rest | Grpc, name: str, vendor: Vendor, watch: Watch, generator: random.Random
) -> list[Told]:
    """Runs streams of random lengths, one after another, until the server is gone."""
    told: list[Told] = []
    while not told or told[-1].whole:
        request_id = f"kill.{name}.{len(told)}"
        words = generator.randint(3, 30)
        vendor.scripts[request_id] = Answer("word " * words, at=dict.fromkeys(range(words), PACE))
        told.append(await client(text(request_id), request_id, stream=True, piece=watch.came))
    return told
