"""A block of the matrix: one vendor at one kind of task, an app of its own before it, every fault on both wires."""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from pomelo.app import App, open_app
from pomelo.catalog.catalog import Catalog
from pomelo.engine.circuit_breaker import CircuitBreaker
from pomelo.engine.routing import RETRIES, Router
from pomelo.errors import TABLE
from pomelo.providers import Credentials
from pomelo.providers.base import Job, Provider
from pomelo.providers.http.client import Http, Timeouts
from pomelo.settings import Settings
from pomelo.stores.usage import UsageQuery, UsageRecord
from pomelo.testing import FaultUpstream
from pomelo.testing.addresses import Unresolving
from pomelo.testing.faults import FAULTS, LATE, OK, UNAVAILABLE, Fault
from pomelo.testing.leftovers import closed, nothing_left
from pomelo.testing.suite import KEY, LENIENCE, PROMPT, SECRETS, SOUND, TRIES, Subject, kind_of
from tests.app import endow
from tests.driver import GrpcDriver, Outcome, RestDriver, TaskRequest

LIMIT = 0.3
"""Seconds of every limit that the app has for its vendors."""

DEADLINE = 0.6
"""Seconds of the caller's deadline where nothing else ends a fault."""

PROMPTLY = 4.0
"""Seconds for what neither a limit nor a deadline has to end."""

MODELS = {
    "openai": "gpt-4",
    "anthropic": "claude-3-haiku",
    "mistral": "mixtral-8x7b",
    "bfl": "flux-1-pro",
    "together": "flux-1-schnell",
    "replicate": "flux-1-schnell",
    "text_to_speech": "eleven-labs-tts",
    "speech_to_speech": "eleven-labs-sts",
    "speech_to_text": "eleven-labs-stt",
}
"""The model that is asked for, by the vendor or, where that has several, by the kind."""

_HEARD = base64.b64encode(SOUND).decode()
BODIES: Mapping[str, dict[str, Any]] = {
    "text": {"messages": [{"role": "user", "content": PROMPT}]},
    "image": {"prompt": PROMPT},
    "text_to_speech": {"text": PROMPT, "voice": "adam"},
    "speech_to_speech": {"audio": _HEARD, "voice": "adam"},
    "speech_to_text": {"audio": _HEARD},
}


@dataclass(frozen=True)
class Row:
    """What came of one run. `billed` are the bytes of its usage record, 0 where it left none."""

    vendor: str
    kind: str
    fault: str
    wire: str
    stream: bool
    code: str
    status: str
    seconds: float
    delivered: int
    request_id: str
    billed: int = 0

    def __str__(self) -> str:
        how = "stream" if self.stream else "whole"
        return (
            f"{self.vendor:10} {self.kind:16} {self.fault:28} {self.wire:4} {how:6} {self.code:24} "
            f"{self.status:18} {self.seconds:5.2f} {self.delivered:9} {self.billed:9}"
        )


HEAD = f"{'vendor':10} {'kind':16} {'fault':28} {'wire':4} {'how':6} {'outcome':24} {'status':18} {'s':>5} {'delivered':>9} {'billed':>9}"

_numbers = itertools.count()


@dataclass(frozen=True)
class Block:
    """A vendor at a kind of task."""

    subject: Subject
    job: Job

    @property
    def kind(self) -> str:
        """The kind of task."""
        return kind_of(self.job)

    @property
    def vendor(self) -> str:
        """The provider's name."""
        return self.subject.name

    @property
    def model(self) -> str:
        """The model that is asked for."""
        return MODELS.get(self.vendor) or MODELS[self.kind]

    def __str__(self) -> str:
        return f"{self.vendor} {self.kind}"

    def faults(self) -> list[Fault]:
        """Those that can be here, whole or streamed."""
        return [fault for fault in FAULTS if self.hows(fault)]

    def hows(self, fault: Fault) -> list[bool]:
        """Whether whole (False) and streamed (True) answers can have it."""
        return [how for how in (False, True) if not fault.absence(self.subject.wire, self.kind, how)]


async def run_block(block: Block, folder: Path) -> tuple[list[Row], list[str]]:
    """Every run of a block, and what is wrong with them. A fault's runs, whole and streamed on both wires, are
    at once; nothing else may run in the process."""
    rows: list[Row] = []
    problems: list[str] = []
    async with nothing_left(problems, within=0.5), FaultUpstream() as upstream:
        async with _opened(block, upstream, folder) as (app, wires):
            for fault in (None, *block.faults()):
                kept = _files(folder / "media")
                found = await _runs(block, wires, upstream, fault)
                for _ in range(TRIES - 1):  # so that a busy machine fails nobody
                    if not any(_late(row, fault) for row, _ in found):
                        break
                    found = await _runs(block, wires, upstream, fault)
                await app.draining.idle()
                try:
                    async with asyncio.timeout(1):
                        await upstream.idle()
                except TimeoutError:
                    problems.append(f"{block} {fault and fault.name}: the vendor still serves a request")
                if all(row.code != OK for row, _ in found) and (more := _files(folder / "media") - kept):
                    problems.append(f"{block} {fault and fault.name}: media are left: {sorted(more)}")
                records, _ = await app.store.list_usage(UsageQuery(), limit=100)
                billed = {record.request_id: record for record in records}
                for row, outcome in found:
                    record = billed.get(row.request_id)
                    row = replace(row, billed=record.output_bytes if record else 0)
                    rows.append(row)
                    problems += [f"{row}: {problem}" for problem in _misbilled(row, record)]
                    problems += [f"{row}: {problem}" for problem in _wrong(row, fault, outcome)]
        if not await closed(upstream, within=0.5):
            problems.append(f"{block}: {upstream.connections} connections to the vendor are open")
    return rows, problems


async def _runs(
    block: Block, wires: Mapping[str, Any], upstream: FaultUpstream, fault: Fault | None
) -> list[tuple[Row, Outcome]]:
    upstream.default = None if fault is None else fault.script(block.subject.wire, block.kind)
    model = block.model if fault is None or fault.address is None else _misled(block, fault)
    body = {"model": model, **BODIES[block.kind]}
    timeout = DEADLINE if fault is not None and fault.endless else None

    async def one(wire: str, stream: bool) -> tuple[Row, Outcome]:
        began = time.perf_counter()
        request_id = f"run-{next(_numbers)}"
        asked = TaskRequest(body, wires["key"], stream, request_id=request_id, timeout=timeout)
        outcome = await wires[wire](asked)
        seconds = time.perf_counter() - began
        name = "a good answer" if fault is None else fault.name
        delivered = _bytes(outcome)
        code = outcome.code
        status = outcome.grpc_status if wire == "grpc" else str(outcome.status)
        return Row(
            block.vendor, block.kind, name, wire, stream, code, status, seconds, delivered, request_id
        ), outcome

    hows = [False, True] if fault is None else block.hows(fault)
    runs = [one(wire, how) for wire in ("grpc", "rest") for how in hows]
    if fault is None or fault.name != "second answer":
        return await asyncio.gather(*runs)
    # What came unasked is told from an answer by coming ahead of the question: one question at a time.
    found = []
    for run in runs:
        found.append(await run)
        await upstream.idle()
    return found


def _wrong(row: Row, fault: Fault | None, outcome: Outcome) -> list[str]:
    problems = []
    expected = OK if fault is None else fault.code(row.stream)
    if row.code != expected:
        problems.append(f"it should end in {expected}")
    elif row.status != (wanted := _status(row, outcome)):
        problems.append(f"its status should be {wanted}")
    if fault is None:
        return problems if row.delivered else [*problems, "it has no output"]
    if row.code != OK and not row.stream and outcome.output:
        problems.append("a failed whole task has an output")
    if any(secret in outcome.message for secret in SECRETS):
        problems.append(f"its message shows a secret: {outcome.message}")
    if fault.wait is not None and not row.stream and outcome.retry_after != fault.wait:
        problems.append(f"its Retry-After is {outcome.retry_after}, and should be {fault.wait}")
    if late := _late(row, fault):
        problems.append(late)
    return problems


def _misbilled(row: Row, record: UsageRecord | None) -> list[str]:
    """A good answer is billed whole, a cut one what was delivered, and any other is not."""
    if row.code == OK:
        return [] if record is not None and record.complete else ["it has no complete usage record"]
    if not row.stream or not row.delivered:
        # What the vendor's end overtook was passed on, and is not the vendor's to take back.
        return ["it is billed"] if record is not None and (not row.stream or record.complete) else []
    if record is None or record.complete or record.output_bytes < row.delivered or not record.cost:
        return ["what was delivered is not what is billed"]
    return []


def _late(row: Row, fault: Fault | None) -> str:
    """What is wrong with a run's time, if anything."""
    if row.code == LATE and (fault is None or fault.code(row.stream) != LATE):
        return "a limit came first"
    if fault is None:
        return ""
    # Where the vendor can have done nothing the same route is asked again.
    tries = RETRIES + 1 if fault.code(row.stream) == UNAVAILABLE else 1
    most = (LIMIT * tries if fault.stalls else DEADLINE if fault.endless else PROMPTLY) + LENIENCE
    if row.seconds > most:
        return f"it should end within {most:.2f} s"
    said = row.stream and row.kind in ("text", "text_to_speech", "speech_to_speech")
    return "nothing came before it" if fault.keeps and said and not row.delivered else ""


def _status(row: Row, outcome: Outcome) -> str:
    if row.wire == "grpc":
        return "OK" if row.code == OK else TABLE[row.code].status
    # A stream's head is out with its first event: what fails later is an event of it.
    begun = row.code == OK or (row.stream and outcome.output)
    return "200" if begun else str(TABLE[row.code].http)


def _bytes(outcome: Outcome) -> int:
    output = outcome.output
    for name in ("audio", "inline", "linked"):
        if name in output:
            return int(output[name].split()[0])
    return len(output.get("text", "").encode())


@asynccontextmanager
async def _opened(
    block: Block, upstream: FaultUpstream, folder: Path
) -> AsyncIterator[tuple[App, dict[str, Any]]]:
    """An app whose one vendor is the block's, and clients of both wires."""
    base = block.subject.base_url(upstream)
    limits = Timeouts(connect=LIMIT, silence=LIMIT, whole=LIMIT)
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=folder, grace=2.0)
    router = partial(Router, sleep=_no_time, breaker=partial(CircuitBreaker, minimum_calls=10**9))
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http(limits, resolver=Unresolving()))
        providers: dict[str, Provider] = {}
        urls = {block.vendor: base} | {
            _misled(block, fault): stack.enter_context(fault.address(base))
            for fault in FAULTS
            if fault.address is not None
        }
        for name, url in urls.items():
            providers[name] = block.subject.make(Credentials(KEY, url), http)
            stack.push_async_callback(providers[name].aclose)
        catalog = _catalog(block, providers)
        app = await stack.enter_async_context(
            open_app(settings, catalog=catalog, providers=providers, make_router=router)
        )
        await endow(app.store)
        _, key = await app.keyring.create("default", live=True)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        assert app.rest is not None
        assert app.grpc is not None
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(app.grpc))
        rest = RestDriver(session, "http://{}:{}".format(*app.rest))
        yield app, {"grpc": GrpcDriver(channel), "rest": rest, "key": key}


def _misled(block: Block, fault: Fault) -> str:
    """The name of the model, and of the provider, of an address at which no vendor is."""
    return f"{block.model}, {fault.name}"


def _catalog(block: Block, providers: Mapping[str, Provider]) -> Catalog:
    """The model with the block's vendor alone, and one for each place where that isn't."""
    model = Catalog.load().resolve(block.model)
    (route,) = [route for route in model.routes if route.provider == block.job.route.provider]
    return Catalog(
        replace(
            model,
            name=block.model if name == block.vendor else name,
            routes=(replace(route, provider=name),),
        )
        for name in providers
    )


async def _no_time(seconds: float) -> None:
    await asyncio.sleep(0)


def _files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}
