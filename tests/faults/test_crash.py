"""A server that dies: whatever a caller was told is in the books, and the books add up to the microcredit.

`kill -9` at every point of a task's life, and at any moment under many streams. The everyday size is small;
`make crash` is the full one.
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
from tests.faults.drivers import GONE, ChunkCounter, GrpcDriver, Outcome, RestDriver, open_drivers
from tests.faults.server_process import RESOLVED_WITHIN, Books, Deployment, ServerProcess, read_books
from tests.redis_server import RedisServer

log = logging.getLogger("tests.crash")

FULL = os.environ.get("CRASH") == "full"
TIMES = 20 if FULL else 1
"""Crashes at each point."""
KILLS = {"sqlite": 50 if FULL else 2, "redis": 20 if FULL else 1}
STREAMS = 200 if FULL else 50
"""Streams that live at each kill."""

CREDITS = 10**12
WORDS = "one two three four five six"


@dataclass(frozen=True)
class Point:
    """Where a task's server dies, and what it is then. `streams`: only a stream comes by there; `text`: only
    a text does. `settled`: the task's whole answer is in the books. `noted`: what was delivered is."""

    streams: bool = False
    text: bool = False
    settled: bool = False
    noted: bool = False


POINTS = {
    "before_take": Point(),
    "in_take": Point(),
    "after_take": Point(),
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
    """What the playing vendors answer, by the request id that is in the text; else WORDS or a sound."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.asked: Counter[str] = Counter()

    def __call__(self, received: Received) -> Reply:
        """The reply to a request."""
        request_id = id_in(received)
        self.asked[request_id] += 1
        script = self.scripts.get(request_id)
        if script is None:
            script = Answer(WORDS) if "messages" in received.body else Speech()
        return script if isinstance(script, Reply) else script(received)


def id_in(received: Received) -> str:
    """The request id of Pomelo's caller: the first word of what it sent."""
    said = received.prompt if "messages" in received.body else received.body["text"]
    return str(said).split()[0]


def text(request_id: str) -> dict[str, Any]:
    """A text task."""
    return {"model": "gpt-4", "messages": [{"role": "user", "content": f"{request_id} Count, please."}]}


def speech(request_id: str) -> dict[str, Any]:
    """A speech task."""
    return {"model": "eleven-labs-tts", "text": f"{request_id} Count, please. " + "la " * 20, "voice": "adam"}


@pytest.fixture
async def vendor(upstream: FaultUpstream) -> AsyncIterator[Vendor]:
    """The playing vendors' director."""
    upstream.reset()
    upstream.default = director = Vendor()
    yield director
    upstream.default = None
    upstream.reset()


def emitted(upstream: FaultUpstream) -> Counter[str]:
    """The tokens that the playing vendor has sent, by request id."""
    sent: Counter[str] = Counter()
    for received in upstream.requests:
        sent[id_in(received)] += received.tokens_sent
    return sent


def check_told(books: Books, told: Outcome, sent: Mapping[str, int]) -> None:
    """What a caller was told of a task is in the books, once; of what it was not told, no more than was sent."""
    records = books.records.get(told.request_id, [])
    assert len(records) <= 1, records
    if told.complete:
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
    """One crash: what its callers were told."""

    point: str
    number: int
    began: float = field(default_factory=time.time)
    told: list[Outcome] = field(default_factory=list)

    @property
    def dying(self) -> str:
        """The request id of the task whose server dies."""
        place = "after_note" if self.point == "in_recovery" else self.point
        return f"crash.{place}.{self.name}"

    @property
    def name(self) -> str:
        """What no other round is called."""
        return f"{self.point}.{self.number}"

    def body(self) -> tuple[dict[str, Any], bool]:
        """The task whose server dies, and whether it is a stream: in turn of each kind that comes by there."""
        what = POINTS[self.point]
        turn = (self.number + list(POINTS).index(self.point)) // 2
        make = text if what.text or turn % 2 == 0 else speech
        return make(self.dying), what.streams or turn % 4 < 2


@pytest.fixture(scope="module")
async def house(
    tmp_path_factory: pytest.TempPathFactory, upstream: FaultUpstream
) -> AsyncIterator[Deployment]:
    """One data folder for all the crashes: what the last one left is what the next one begins with."""
    async with await Deployment(tmp_path_factory.mktemp("house"), upstream).prepare(CREDITS) as lasting:
        yield lasting


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_at_any_point_loses_nothing_and_charges_nothing_twice(
    point: str, house: Deployment, upstream: FaultUpstream, vendor: Vendor
) -> None:
    waits = []
    for number in range(TIMES):
        process = await house.ensure_running()
        round_ = Round(point, number)
        async with open_drivers(process.rest, process.grpc, house.key) as wires:
            await crash(round_, wires, process, vendor)
        process = await restart(house, point)
        books = await read_books(process, round_.began)
        waits.append(time.monotonic() - process.started)
        books.check_idle()
        check(round_, books, emitted(upstream))
        vendor.scripts.clear()
        async with open_drivers(process.rest, process.grpc, house.key) as wires:
            await check_repeat(round_, wires, process, vendor)
        upstream.requests.clear()
    assert max(waits) < RESOLVED_WITHIN
    log.info("%-28s %3d crashes, nothing held %.2f s after the restart at most", point, TIMES, max(waits))


async def crash(
    round_: Round, wires: tuple[RestDriver, GrpcDriver], process: ServerProcess, vendor: Vendor
) -> None:
    """Runs tasks until the server dies at the point: two that end, two that live, and the one."""
    rest, grpc = wires
    name = round_.name
    round_.told += [
        await rest(text(f"done.rest.{name}"), f"done.rest.{name}"),
        await grpc(speech(f"done.grpc.{name}"), f"done.grpc.{name}", stream=True),
    ]
    assert all(told.complete for told in round_.told)
    watch = ChunkCounter()
    live = []
    for wire, lives in ((rest, f"live.rest.{name}"), (grpc, f"live.grpc.{name}")):
        vendor.scripts[lives] = Answer(WORDS, at={2: Gate()})
        live.append(asyncio.create_task(wire(text(lives), lives, stream=True, on_chunk=watch.add)))
    await watch.wait_for(4)
    body, stream = round_.body()
    if "note" in round_.dying:
        vendor.scripts[round_.dying] = (
            Speech(at={2: Gate()}) if "text" in body else Answer(WORDS, at={2: Gate()})
        )
    elif "void" in round_.point:
        vendor.scripts[round_.dying] = error_reply(400)
    last = await wires[round_.number % 2](body, round_.dying, stream=stream, idempotency_key=round_.dying)
    if round_.point == "after_the_answer":
        assert last.complete
        process.kill()
    assert await process.wait() == -signal.SIGKILL
    round_.told += [last, *await asyncio.gather(*live)]
    assert [told.code for told in round_.told[-2:]] == [GONE, GONE]
    assert [told.chunks for told in round_.told[-2:]] == [2, 2]


async def restart(house: Deployment, point: str) -> ServerProcess:
    """A new server on the same data folder; in between one that dies while it recovers."""
    if point == "in_recovery":
        dead = await house.start(expect_exit=True, DIE_IN_RECOVERY="1")
        assert dead.process.returncode == -signal.SIGKILL
    return await house.start()


def check(round_: Round, books: Books, sent: Mapping[str, int]) -> None:
    """All that callers were told is in the books, and of the one task what its point says."""
    for told in round_.told:
        check_told(books, told, sent)
    assert set(books.records) <= {told.request_id for told in round_.told}
    what = POINTS[round_.point]
    mine = books.records.get(round_.dying, [])
    assert any(record["complete"] for record in mine) == what.settled
    if what.noted:
        for wire in ("rest", "grpc"):
            (record,) = books.records[f"live.{wire}.{round_.name}"]
            assert (record["source"], record["output_tokens"]) == ("recovered", 2)
        (record,) = mine
        assert record["source"] == "recovered"
        assert record["cost"] > 0


async def check_repeat(
    round_: Round, wires: tuple[RestDriver, GrpcDriver], process: ServerProcess, vendor: Vendor
) -> None:
    """Whoever asks again with the same Idempotency-Key gets an answer; it was charged once."""
    body, stream = round_.body()
    again = f"again.{round_.name}"
    asked = vendor.asked[round_.dying]
    told = await wires[(round_.number + 1) % 2](body, again, stream=stream, idempotency_key=round_.dying)
    assert told.complete, told
    books = await read_books(process, round_.began)
    books.check_idle()
    settled = POINTS[round_.point].settled
    both = books.records.get(round_.dying, []) + books.records.get(again, [])
    (whole,) = [record for record in both if record["complete"]]
    assert told.task_id == whole["task_id"]
    assert whole["request_id"] == (round_.dying if settled else again)
    assert vendor.asked[round_.dying] == asked + (not settled)
    if settled:
        assert told.headers["x-credits-charged"] == "0"


# --- at any moment


@pytest.fixture(params=KILLS)
def kills(request: pytest.FixtureRequest) -> Iterator[tuple[int, dict[str, str]]]:
    """How often the server is killed, and the variables of its store."""
    if request.param == "sqlite":
        yield KILLS["sqlite"], {}
        return
    with RedisServer() as server:
        yield KILLS["redis"], {"POMELO_STORE": server.url}


async def resolved(process: ServerProcess, since: float) -> Books:
    """The books, once nothing is held any more; how long that may take is the caller's to say."""
    async with asyncio.timeout(2 * RESOLVED_WITHIN):
        while (await read_books(process, since)).held:  # noqa: ASYNC110 (it tells no event of it)
            await asyncio.sleep(0.1)
    return await read_books(process, since)


@pytest.mark.timeout(3000 if FULL else 120)
async def test_a_server_that_is_killed_under_live_streams_loses_nothing(
    kills: tuple[int, dict[str, str]], tmp_path: Path, upstream: FaultUpstream, vendor: Vendor
) -> None:
    times, store = kills
    chance = random.Random(20261124)
    whole, cut, recovered = 0, 0, 0
    unbilled: list[int] = []
    waits: list[float] = []
    async with await Deployment(tmp_path, upstream, **store).prepare(CREDITS) as house:
        process = await house.start()
        for number in range(times):
            began = time.time()
            watch = ChunkCounter()
            async with open_drivers(process.rest, process.grpc, house.key, concurrency=STREAMS // 2) as wires:
                living = [
                    asyncio.create_task(
                        until_the_end(wires[one % 2], f"{number}.{one}", vendor, watch, chance)
                    )
                    for one in range(STREAMS)
                ]
                await watch.wait_for(STREAMS * 4 + chance.randrange(STREAMS * 20))
                process.kill()
                await process.wait()
                told = [one for many in await asyncio.gather(*living) for one in many]
            process = await house.start()
            books = await resolved(process, began)
            waits.append(time.monotonic() - process.started)
            books.check_idle()
            sent = emitted(upstream)
            for one in told:
                check_told(books, one, sent)
            assert set(books.records) <= {one.request_id for one in told}
            last = [one for one in told if not one.complete]
            assert len(last) == STREAMS
            assert {one.code for one in last} == {GONE}
            for one in last:
                billed = sum(record["output_tokens"] for record in books.records.get(one.request_id, ()))
                recovered += one.request_id in books.records
                unbilled.append(max(0, one.chunks - billed))
            whole += len(told) - len(last)
            cut += len(last)
            upstream.requests.clear()
            vendor.scripts.clear()
    assert max(waits) < RESOLVED_WITHIN
    unbilled.sort()
    log.info(
        "%s: %d kills under %d streams: %d acknowledged, none lost; %d cut, of which %d were charged something; "
        "words that were delivered and not charged: p50 %d, p99 %d, most %d (a word every %.2f s); nothing "
        "held p50 %.2f s, at most %.2f s after the restart",
        "Redis" if store else "SQLite", times, STREAMS, whole, cut, recovered,
        unbilled[len(unbilled) // 2], unbilled[len(unbilled) * 99 // 100], unbilled[-1], PACE,
        sorted(waits)[len(waits) // 2], max(waits),
    )  # fmt: skip


PACE = 0.15
"""Seconds from one word to the next."""


async def until_the_end(
    wire: RestDriver | GrpcDriver, name: str, vendor: Vendor, watch: ChunkCounter, chance: random.Random
) -> list[Outcome]:
    """One stream after another, of any length, until the server is gone."""
    told: list[Outcome] = []
    while not told or told[-1].complete:
        request_id = f"kill.{name}.{len(told)}"
        words = chance.randint(3, 30)
        vendor.scripts[request_id] = Answer("word " * words, at=dict.fromkeys(range(words), PACE))
        told.append(await wire(text(request_id), request_id, stream=True, on_chunk=watch.add))
    return told
