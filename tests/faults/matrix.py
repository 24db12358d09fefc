"""One block of the fault matrix: all faults of a vendor at a task type, through an app over both protocols."""

from __future__ import annotations

import asyncio
import base64
import itertools
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
from pomelo.engine.routing import ATTEMPTS, Router
from pomelo.errors import TABLE
from pomelo.providers import Credentials
from pomelo.providers.base import Job, Provider
from pomelo.providers.http.client import Http, Timeouts
from pomelo.settings import Settings
from pomelo.stores.usage import UsageQuery, UsageRecord
from pomelo.testing import FaultUpstream
from pomelo.testing.addresses import UnknownHostResolver
from pomelo.testing.faults import FAULTS, OK, TIMEOUT, UNAVAILABLE, Fault
from pomelo.testing.leaks import connections_closed, no_leaks
from pomelo.testing.suite import AUDIO, CASE_ATTEMPTS, KEY, PROMPT, SECRETS, TOLERANCE, Subject, task_type_of
from tests.app import endow
from tests.driver import Outcome, TaskRequest
from tests.grpc_driver import GrpcDriver
from tests.load.process_usage import clock
from tests.rest_driver import RestDriver
from tests.waiting import first

LIMIT = 0.3
"""Seconds of each of the app's time limits for vendors."""

DEADLINE = 0.6
"""Seconds of the caller's deadline, for faults that nothing else ends."""

MAX_SECONDS = 4.0
"""Seconds for a fault that ends without a time limit or a deadline."""

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
"""The model of a block, by its vendor, or by its task type for a vendor with several."""

_AUDIO = base64.b64encode(AUDIO).decode()
BODIES: Mapping[str, dict[str, Any]] = {
    "text": {"messages": [{"role": "user", "content": PROMPT}]},
    "image": {"prompt": PROMPT},
    "text_to_speech": {"text": PROMPT, "voice": "adam"},
    "speech_to_speech": {"audio": _AUDIO, "voice": "adam"},
    "speech_to_text": {"audio": _AUDIO},
}


@dataclass(frozen=True)
class Row:
    """The result of one run. `delivered` and `billed` are bytes; `billed` is 0 without a usage record."""

    vendor: str
    task_type: str
    fault: str
    protocol: str
    stream: bool
    code: str
    status: str
    seconds: float
    delivered: int
    request_id: str
    billed: int = 0

    def __str__(self) -> str:
        mode = "stream" if self.stream else "whole"
        return _line(
            self.vendor, self.task_type, self.fault, self.protocol, mode, self.code, self.status,
            f"{self.seconds:.2f}", self.delivered, self.billed,
        )  # fmt: skip


def _line(*cells: object) -> str:
    return "{:10} {:16} {:28} {:8} {:6} {:24} {:18} {:>5} {:>9} {:>9}".format(*cells)


HEAD = _line(
    "vendor", "task type", "fault", "protocol", "mode", "outcome", "status", "s", "delivered", "billed"
)

_numbers = itertools.count()


@dataclass(frozen=True)
class Block:
    subject: Subject
    job: Job[Any]

    @property
    def task_type(self) -> str:
        return task_type_of(self.job)

    @property
    def vendor(self) -> str:
        return self.subject.name

    @property
    def model(self) -> str:
        return MODELS.get(self.vendor) or MODELS[self.task_type]

    def __str__(self) -> str:
        return f"{self.vendor} {self.task_type}"

    def faults(self) -> list[Fault]:
        """The faults that can occur in this block."""
        return [fault for fault in FAULTS if self.streams(fault)]

    def streams(self, fault: Fault) -> list[bool]:
        """The values of `stream` for which the fault can occur."""
        return [
            stream
            for stream in (False, True)
            if not fault.unsupported_reason(self.subject.protocol, self.task_type, stream)
        ]


async def run_block(block: Block, folder: Path) -> tuple[list[Row], list[str]]:
    """Runs every fault of a block; returns the rows and the problems found. The runs of one fault, whole and
    streamed over both protocols, are concurrent; nothing else may run in the process."""
    rows: list[Row] = []
    problems: list[str] = []
    async with no_leaks(problems, within=3.0), FaultUpstream() as upstream:
        async with _open_app(block, upstream, folder) as (app, drivers):
            for fault in (None, *block.faults()):
                files_before = _files(folder / "media")
                runs = await _run_fault(block, drivers, upstream, fault)
                for _ in range(CASE_ATTEMPTS - 1):  # a busy machine may be too slow once
                    if not any(_late(row, fault) for row, _ in runs):
                        break
                    runs = await _run_fault(block, drivers, upstream, fault)
                await app.draining.idle()
                # A call that its caller ended doesn't wait for its bill.
                await first(app.store.drafts, lambda running: not running)
                try:
                    async with asyncio.timeout(20):
                        await upstream.idle()
                except TimeoutError:
                    problems.append(f"{block} {fault and fault.name}: the vendor still serves a request")
                leftover = _files(folder / "media") - files_before
                if leftover and all(row.code != OK for row, _ in runs):
                    problems.append(f"{block} {fault and fault.name}: media are left: {sorted(leftover)}")
                records, _ = await app.store.list_usage(UsageQuery(), limit=100)
                billed = {record.request_id: record for record in records}
                for row, outcome in runs:
                    record = billed.get(row.request_id)
                    row = replace(row, billed=record.output_bytes if record else 0)
                    rows.append(row)
                    problems += [f"{row}: {problem}" for problem in _misbilled(row, record)]
                    problems += [f"{row}: {problem}" for problem in _wrong(row, fault, outcome)]
        if not await connections_closed(upstream, within=3.0):
            problems.append(f"{block}: {upstream.connections} connections to the vendor are open")
    return rows, problems


async def _run_fault(
    block: Block, drivers: Mapping[str, Any], upstream: FaultUpstream, fault: Fault | None
) -> list[tuple[Row, Outcome]]:
    upstream.default = None if fault is None else fault.script(block.subject.protocol, block.task_type)
    model = block.model if fault is None or fault.address is None else _misdirected(block, fault)
    body = {"model": model, **BODIES[block.task_type]}
    timeout = DEADLINE if fault is not None and fault.endless else None

    async def run(protocol: str, stream: bool) -> tuple[Row, Outcome]:
        began = clock()
        request_id = f"run-{next(_numbers)}"
        request = TaskRequest(body, drivers["key"], stream, request_id=request_id, timeout=timeout)
        outcome = await drivers[protocol](request)
        row = Row(
            vendor=block.vendor,
            task_type=block.task_type,
            fault="a good answer" if fault is None else fault.name,
            protocol=protocol,
            stream=stream,
            code=outcome.code,
            status=outcome.grpc_status if protocol == "grpc" else str(outcome.status),
            seconds=clock() - began,
            delivered=_bytes(outcome),
            request_id=request_id,
        )
        return row, outcome

    streams = [False, True] if fault is None else block.streams(fault)
    runs = [run(protocol, stream) for protocol in ("grpc", "rest") for stream in streams]
    if fault is None or fault.name != "one response too many":
        return await asyncio.gather(*runs)
    # An unrequested answer is recognised because it precedes the next request: one request at a time.
    results = []
    for one in runs:
        results.append(await one)
        await upstream.idle()
    return results


def _wrong(row: Row, fault: Fault | None, outcome: Outcome) -> list[str]:
    problems = []
    expected = OK if fault is None else fault.code(row.stream)
    if row.code != expected:
        problems.append(f"it should end in {expected}")
    elif row.status != (status := _status(row, outcome)):
        problems.append(f"its status should be {status}")
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
    """Problems with the bill: a good answer has a complete usage record, a cut one a record of what was
    delivered, any other none."""
    if row.code == OK:
        return [] if record is not None and record.complete else ["it has no complete usage record"]
    if not row.stream or not row.delivered:
        # A stream may end before its last chunk reaches the caller; that chunk was sent, and is billed.
        return ["it is billed"] if record is not None and (not row.stream or record.complete) else []
    if record is None or record.complete or record.output_bytes < row.delivered or not record.cost:
        return ["the bill differs from what was delivered"]
    return []


def _late(row: Row, fault: Fault | None) -> str:
    """A problem with a run's duration, or ""."""
    if row.code == TIMEOUT and (fault is None or fault.code(row.stream) != TIMEOUT):
        return "a time limit ended it first"
    if fault is None:
        return ""
    # A request that the vendor can't have processed is retried on the same route.
    tries = ATTEMPTS if fault.code(row.stream) == UNAVAILABLE else 1
    limit = (LIMIT * tries if fault.stalls else DEADLINE if fault.endless else MAX_SECONDS) + TOLERANCE
    if row.seconds > limit:
        return f"it should end within {limit:.2f} s"
    has_chunks = row.stream and row.task_type in ("text", "text_to_speech", "speech_to_speech")
    return "nothing was delivered before it" if fault.keeps and has_chunks and not row.delivered else ""


def _status(row: Row, outcome: Outcome) -> str:
    if row.protocol == "grpc":
        return "OK" if row.code == OK else TABLE[row.code].status
    # The status is sent with the first event of a stream: a later failure is an event.
    begun = row.code == OK or (row.stream and outcome.output)
    return "200" if begun else str(TABLE[row.code].http)


def _bytes(outcome: Outcome) -> int:
    output = outcome.output
    for name in ("audio", "inline", "linked"):
        if name in output:
            return int(output[name].split()[0])
    return len(output.get("text", "").encode())


@asynccontextmanager
async def _open_app(
    block: Block, upstream: FaultUpstream, folder: Path
) -> AsyncIterator[tuple[App, dict[str, Any]]]:
    """Opens an app whose only vendor is the block's, and a driver for each protocol."""
    base = block.subject.base_url(upstream)
    limits = Timeouts(connect=LIMIT, silence=LIMIT, whole=LIMIT)
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=folder, grace=2.0)
    router = partial(Router, sleep=_skip_wait, breaker=partial(CircuitBreaker, minimum_calls=10**9))
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http(limits, resolver=UnknownHostResolver()))
        providers: dict[str, Provider] = {}
        urls = {block.vendor: base} | {
            _misdirected(block, fault): stack.enter_context(fault.address(base))
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


def _misdirected(block: Block, fault: Fault) -> str:
    """The name of the model, and of the provider, whose address has no vendor."""
    return f"{block.model}, {fault.name}"


def _catalog(block: Block, providers: Mapping[str, Provider]) -> Catalog:
    """The block's model with the block's vendor as its only route, and a copy of it for each other
    address."""
    model = Catalog.load().by_any_name[block.model]
    (route,) = [route for route in model.routes if route.provider == block.job.route.provider]
    return Catalog(
        replace(
            model, name=block.model if name == block.vendor else name, routes=(replace(route, provider=name),)
        )
        for name in providers
    )


async def _skip_wait(seconds: float) -> None:
    await asyncio.sleep(0)


def _files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}
