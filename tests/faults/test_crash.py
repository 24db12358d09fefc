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

from pomelo.testing import Answer, FaultUpstream, Gate, Speech, error_reply
from tests.faults.books import Books
from tests.faults.drivers import GONE, ChunkCounter, GrpcDriver, Outcome, RestDriver
from tests.faults.server_process import RESOLVED_WITHIN, Deployment, ServerProcess
from tests.faults.vendor import STOPPED_MODEL, WORDS, Vendor, request_id_of, speech, text
from tests.redis_server import RedisServer

log = logging.getLogger("tests.crash")

FULL = os.environ.get("CRASH") == "full"
TIMES = 20 if FULL else 1
"""Number of crashes at each point."""
KILLS = {"sqlite": 50 if FULL else 2, "redis": 20 if FULL else 1}
STREAMS = 200 if FULL else 50
"""Number of running streams at each kill."""

CREDITS = 10**12


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


def tokens_sent(upstream: FaultUpstream) -> Counter[str]:
    """The tokens that the vendor has sent, by request id."""
    sent: Counter[str] = Counter()
    for received in upstream.requests:
        sent[request_id_of(received)] += received.tokens_sent
    return sent


def check_received(books: Books, outcome: Outcome, sent: Mapping[str, int]) -> None:
    """A complete task has one record; any other task has at most one, with no more output than was sent."""
    records = books.records.get(outcome.request_id, [])
    assert len(records) <= 1, records
    if outcome.complete:
        (record,) = records
        assert record["complete"]
        assert record["task_id"] == outcome.task_id
        if outcome.usage is not None:
            assert (record["input_tokens"], record["output_tokens"]) == outcome.usage
        else:
            assert record["characters"] == len(outcome.body["text"])
    for record in records:
        assert record["uncollected"] == 0
        assert record["complete"] or record["output_tokens"] <= sent[outcome.request_id]
        assert record["characters"] <= len(outcome.body.get("text", ""))
        assert record["complete"] == (record["source"] != "recovered" and not record["code"])


# --- at each point


@dataclass
class Round:
    """One crash, and the outcomes that callers received."""

    point: str
    number: int
    began: float = field(default_factory=time.time)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def dying(self) -> str:
        """The request id of the task whose server dies."""
        point = "after_note" if self.point == "in_recovery" else self.point
        return f"crash.{point}.{self.name}"

    @property
    def name(self) -> str:
        return f"{self.point}.{self.number}"

    def body(self) -> tuple[dict[str, Any], bool]:
        """The task whose server dies, and whether it is a stream; the types that can reach the
        point take turns."""
        point = POINTS[self.point]
        turn = (self.number + list(POINTS).index(self.point)) // 2
        make = text if point.text or turn % 2 == 0 else speech
        body = make(self.dying)
        if "void" in self.point:
            body["model"] = STOPPED_MODEL
        return body, point.streams or turn % 4 < 2


@pytest.fixture(scope="module")
async def deployment(
    tmp_path_factory: pytest.TempPathFactory, upstream: FaultUpstream
) -> AsyncIterator[Deployment]:
    """One data folder for all crashes: each server starts with the state that the previous one left."""
    async with await Deployment(tmp_path_factory.mktemp("deployment"), upstream).prepare(CREDITS) as prepared:
        yield prepared


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_at_any_point_loses_nothing_and_charges_nothing_twice(
    point: str, deployment: Deployment, upstream: FaultUpstream, vendor: Vendor
) -> None:
    waits = []
    for number in range(TIMES):
        process = await deployment.ensure_running()
        round_ = Round(point, number)
        async with process.drivers() as clients:
            await crash(round_, clients, process, vendor)
        process = await restart(deployment, point)
        books = await process.books(round_.began)
        waits.append(process.age())
        books.check_idle()
        check(round_, books, tokens_sent(upstream))
        vendor.scripts.clear()
        async with process.drivers() as clients:
            await check_repeat(round_, clients, process, vendor)
        upstream.requests.clear()
    assert max(waits) < RESOLVED_WITHIN
    log.info("%-28s %3d crashes, nothing reserved %.2f s after the restart at most", point, TIMES, max(waits))


async def crash(
    round_: Round, clients: tuple[RestDriver, GrpcDriver], process: ServerProcess, vendor: Vendor
) -> None:
    """Runs tasks until the server dies at the point: two that complete, two that are running, and the
    one whose server dies."""
    rest, grpc = clients
    name = round_.name
    round_.outcomes += [
        await rest(text(f"done.rest.{name}"), f"done.rest.{name}"),
        await grpc(speech(f"done.grpc.{name}"), f"done.grpc.{name}", stream=True),
    ]
    assert all(outcome.complete for outcome in round_.outcomes)
    watch = ChunkCounter()
    live = []
    for client, request_id in ((rest, f"live.rest.{name}"), (grpc, f"live.grpc.{name}")):
        vendor.scripts[request_id] = Answer(WORDS, at={2: Gate()})
        live.append(
            asyncio.create_task(client(text(request_id), request_id, stream=True, on_chunk=watch.add))
        )
    await watch.wait_for(4)
    body, stream = round_.body()
    if "note" in round_.dying:
        vendor.scripts[round_.dying] = (
            Speech(at={2: Gate()}) if "text" in body else Answer(WORDS, at={2: Gate()})
        )
    elif "void" in round_.point:
        # What is voided has asked no provider, such as a task that an open circuit stops.
        for number in range(2):
            request_id = f"failed.{number}.{name}"
            vendor.scripts[request_id] = error_reply(503)
            failed = await rest(text(request_id) | {"model": STOPPED_MODEL}, request_id)
            assert failed.code == "provider_unavailable"
            round_.outcomes.append(failed)
    last = await clients[round_.number % 2](body, round_.dying, stream=stream, idempotency_key=round_.dying)
    if round_.point == "after_the_answer":
        assert last.complete
        process.kill()
    assert await process.wait() == -signal.SIGKILL
    round_.outcomes += [last, *await asyncio.gather(*live)]
    assert [outcome.code for outcome in round_.outcomes[-2:]] == [GONE, GONE]
    assert [outcome.chunks for outcome in round_.outcomes[-2:]] == [2, 2]


async def restart(deployment: Deployment, point: str) -> ServerProcess:
    """Starts a new server on the same data folder; at `in_recovery`, first one that dies while it
    recovers."""
    if point == "in_recovery":
        dead = await deployment.start(expect_exit=True, DIE_IN_RECOVERY="1")
        assert dead.process.returncode == -signal.SIGKILL
    return await deployment.start()


def check(round_: Round, books: Books, sent: Mapping[str, int]) -> None:
    """Everything that callers received is in the books, and the dying task is in the state of its point."""
    for outcome in round_.outcomes:
        check_received(books, outcome, sent)
    assert set(books.records) <= {outcome.request_id for outcome in round_.outcomes}
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


async def check_repeat(
    round_: Round, clients: tuple[RestDriver, GrpcDriver], process: ServerProcess, vendor: Vendor
) -> None:
    """A repeated request with the same Idempotency-Key is answered, and was charged once."""
    body, stream = round_.body()
    repeat_id = f"repeat.{round_.name}"
    calls = vendor.calls[round_.dying]
    outcome = await clients[(round_.number + 1) % 2](
        body, repeat_id, stream=stream, idempotency_key=round_.dying
    )
    assert outcome.complete, outcome
    books = await process.books(round_.began)
    books.check_idle()
    settled = POINTS[round_.point].settled
    both = books.records.get(round_.dying, []) + books.records.get(repeat_id, [])
    (complete,) = [record for record in both if record["complete"]]
    assert outcome.task_id == complete["task_id"]
    assert complete["request_id"] == (round_.dying if settled else repeat_id)
    assert vendor.calls[round_.dying] == calls + (not settled)
    if settled:
        assert outcome.headers["x-credits-charged"] == "0"


# --- at random times


@pytest.fixture(params=KILLS)
def kills(request: pytest.FixtureRequest) -> Iterator[tuple[int, dict[str, str]]]:
    """The number of kills, and the environment variables of the store."""
    if request.param == "sqlite":
        yield KILLS["sqlite"], {}
        return
    with RedisServer() as server:
        yield KILLS["redis"], {"POMELO_STORE": server.url}


@pytest.mark.timeout(3000 if FULL else 300)
async def test_a_server_killed_during_many_streams_loses_nothing(
    kills: tuple[int, dict[str, str]], tmp_path: Path, upstream: FaultUpstream, vendor: Vendor
) -> None:
    times, store = kills
    generator = random.Random(20261124)
    complete, cut, recovered = 0, 0, 0
    unbilled: list[int] = []
    waits: list[float] = []
    async with await Deployment(tmp_path, upstream, **store).prepare(CREDITS) as deployment:
        process = await deployment.start()
        for number in range(times):
            began = time.time()
            watch = ChunkCounter()
            async with process.drivers(STREAMS // 2) as clients:
                streams = [
                    asyncio.create_task(
                        run_streams(clients[index % 2], f"{number}.{index}", vendor, watch, generator)
                    )
                    for index in range(STREAMS)
                ]
                await watch.wait_for(STREAMS * 4 + generator.randrange(STREAMS * 20))
                process.kill()
                await process.wait()
                outcomes = [outcome for stream in await asyncio.gather(*streams) for outcome in stream]
            process = await deployment.start()
            books = await process.settled_books(began)
            waits.append(process.age())
            books.check_idle()
            sent = tokens_sent(upstream)
            for outcome in outcomes:
                check_received(books, outcome, sent)
            assert set(books.records) <= {outcome.request_id for outcome in outcomes}
            last = [outcome for outcome in outcomes if not outcome.complete]
            assert len(last) == STREAMS
            assert {outcome.code for outcome in last} == {GONE}
            for outcome in last:
                billed = sum(record["output_tokens"] for record in books.records.get(outcome.request_id, ()))
                recovered += outcome.request_id in books.records
                unbilled.append(max(0, outcome.chunks - billed))
            complete += len(outcomes) - len(last)
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


async def run_streams(
    client: RestDriver | GrpcDriver, name: str, vendor: Vendor, watch: ChunkCounter, generator: random.Random
) -> list[Outcome]:
    """Runs streams of random lengths, one after another, until the server is gone."""
    outcomes: list[Outcome] = []
    while not outcomes or outcomes[-1].complete:
        request_id = f"kill.{name}.{len(outcomes)}"
        words = generator.randint(3, 30)
        vendor.scripts[request_id] = Answer("word " * words, at=dict.fromkeys(range(words), PACE))
        outcomes.append(await client(text(request_id), request_id, stream=True, on_chunk=watch.add))
    return outcomes
