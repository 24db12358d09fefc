"""Retry policies of gRPC clients: of grpcio, blocking and with asyncio, and of Node's @grpc/grpc-js.

The clients are as their users configure them: a service config in the channel's options, without Pomelo code.
"""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from pomelo.app import App
from pomelo.call import Call
from pomelo.engine.routing import ATTEMPTS as ROUTE_ATTEMPTS
from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, TaskOptions
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.runtime.draining import Draining
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.server import ServerOptions, open_server
from pomelo.service import TaskService
from pomelo.testing import Answer, FaultUpstream, Received, Reply, error_reply
from tests import node_client
from tests.app import RunningApp, app_fixture
from tests.calls import bearer, reason_of
from tests.conftest import Keys
from tests.driver import METHOD
from tests.faults import frames, http2
from tests.ports import free_port
from tests.tasks import text_task

ATTEMPTS = 4

EVERY_CODE = sorted({row.status for row in TABLE.values()})


def policy(codes: list[str]) -> str:
    """Returns a service config that retries after 30 s, unless the server requests another wait."""
    retries = {
        "maxAttempts": ATTEMPTS,
        "initialBackoff": "30s",
        "maxBackoff": "30s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": codes,
    }
    return json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": retries}]})


PLAIN = policy(["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
EAGER = policy(EVERY_CODE)
"""Retries every error that the server does not forbid to retry."""


RETRYABLE = sorted(
    code for code, row in TABLE.items() if row.http in (409, 429, 503) and code not in {"provider_not_configured", "idempotency_mismatch"}
)  # fmt: skip
FINAL = sorted(set(TABLE) - set(RETRYABLE))


@dataclass
class Result:
    """The result of a call: the name of the status, the code in its details, the text, and the seconds."""

    status: str
    code: str
    content: str
    seconds: float


Client = Callable[[str, str, str, list[tuple[str, str]]], Coroutine[Any, Any, list[Result]]]
"""Makes calls concurrently: address, key, service config, and (method, prompt) of each call."""


async def with_asyncio(address: str, key: str, config: str, calls: list[tuple[str, str]]) -> list[Result]:
    async def one(method: str, prompt: str) -> Result:
        content, began = "", time.monotonic()
        try:
            if method == "RunTask":
                request = RunTaskRequest(spec=text_task(prompt))
                content = (
                    (await stub.RunTask(request, metadata=bearer(key))).result.text.message.content[0].text
                )
            else:
                streamed = StreamTaskRequest(spec=text_task(prompt))
                async for response in stub.StreamTask(streamed, metadata=bearer(key)):
                    content += response.event.text_delta.text
        except grpc.aio.AioRpcError as error:
            return Result(error.code().name, reason_of(error), content, time.monotonic() - began)
        return Result("OK", "", content, time.monotonic() - began)

    async with grpc.aio.insecure_channel(address, options=options(config)) as channel:
        stub = TaskServiceStub(channel)
        return await asyncio.gather(*[one(*call) for call in calls])


async def blocking(address: str, key: str, config: str, calls: list[tuple[str, str]]) -> list[Result]:
    """Calls with grpc, each call in its own thread."""

    def one(method: str, prompt: str) -> Result:
        content, began = "", time.monotonic()
        try:
            if method == "RunTask":
                request = RunTaskRequest(spec=text_task(prompt))
                content = stub.RunTask(request, metadata=bearer(key)).result.text.message.content[0].text
            else:
                streamed = StreamTaskRequest(spec=text_task(prompt))
                for response in stub.StreamTask(streamed, metadata=bearer(key)):
                    content += response.event.text_delta.text
        except grpc.RpcError as error:
            return Result(error.code().name, reason_of(error), content, time.monotonic() - began)
        return Result("OK", "", content, time.monotonic() - began)

    with grpc.insecure_channel(address, options(config)) as channel, ThreadPoolExecutor(len(calls)) as pool:
        stub = TaskServiceStub(channel)
        return await asyncio.to_thread(lambda: list(pool.map(lambda call: one(*call), calls)))


def with_node(modules: Path) -> Client:
    """Returns a client that runs in Node."""

    async def client(address: str, key: str, config: str, calls: list[tuple[str, str]]) -> list[Result]:
        request = {
            "proto": str(node_client.FOLDER.parents[1] / "proto"),
            "address": address,
            "key": key,
            "policy": config,
            "calls": [
                {"id": str(n), "method": method, "prompt": prompt} for n, (method, prompt) in enumerate(calls)
            ],
        }
        results = await node_client.run(modules, "retries.cjs", request)
        return [
            Result(one["code"], _code(b64decode(one["details"])), one["content"], one["seconds"])
            for one in (results[str(n)] for n in range(len(calls)))
        ]

    return client


def _code(details: bytes) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(details).details:
        detail.Unpack(info)
    return str(info.reason).lower()


def options(config: str) -> list[tuple[str, Any]]:
    """Returns the options of a Python channel with its own connection."""
    return [("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(scope="module")
def clients(request: pytest.FixtureRequest) -> dict[str, Client]:
    """All clients by name, for tests in which they wait concurrently."""
    modules = node_client.install(Path(request.config.cache.mkdir("node")))
    return {"asyncio": with_asyncio, "blocking": blocking, "node": with_node(modules)}


@pytest.fixture(scope="module", params=["asyncio", "blocking", "node"])
def client(request: pytest.FixtureRequest, clients: dict[str, Client]) -> Client:
    return clients[request.param]


class Failing:
    """The tasks of an app whose first attempts fail, as the prompt `CODE TIMES step` says. `step` is
    `entering` or, in a stream, `first`: before the first event. Attempts are counted."""

    def __init__(self, inner: TaskService) -> None:
        self._inner = inner
        self.attempts: Counter[str] = Counter()

    def _fail(self, spec: TaskSpec, current: str) -> None:
        prompt = spec.text.messages[0].content[0].text
        code, times, step = prompt.split()[:3]
        if step == current:
            self.attempts[prompt] += 1
            if self.attempts[prompt] <= int(times):
                wait = 1 if TABLE[code].retry_after is not None else None
                raise PomeloError(code, retry_after=wait)

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        self._fail(spec, "entering")
        return await self._inner.run_task(spec, options, call)

    @asynccontextmanager
    async def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AsyncIterator[AsyncIterator[TaskEvent]]:
        self._fail(spec, "entering")
        async with self._inner.stream_task(spec, options, call) as events:
            yield self._events(spec, events)

    async def _events(self, spec: TaskSpec, events: AsyncIterator[TaskEvent]) -> AsyncIterator[TaskEvent]:
        self._fail(spec, "first")
        async for event in events:
            yield event


@dataclass
class Rig:
    address: str
    tasks: Failing


@pytest.fixture(scope="module", name="rig")
async def _rig(app: App) -> AsyncIterator[Rig]:
    tasks = Failing(app.services.tasks)
    services = replace(app.services, tasks=tasks)
    async with open_server(
        services, ServerOptions("127.0.0.1:0"), connections=ConnectionObserver()
    ) as server:
        yield Rig(server.address, tasks)


def calls_of(method: str, codes: list[str], times: int) -> list[tuple[str, str]]:
    """Returns calls that fail with each code that often; streams at both steps."""
    steps = ["entering"] if method == "RunTask" else ["entering", "first"]
    return [(method, f"{code} {times} {step} {time.monotonic_ns()}") for code in codes for step in steps]


async def test_a_temporary_error_is_retried_after_the_wait_that_the_server_requests(
    clients: dict[str, Client], rig: Rig, keys: Keys
) -> None:
    async def check(name: str) -> None:
        calls = calls_of("RunTask", RETRYABLE, times=2) + calls_of("StreamTask", RETRYABLE, times=2)
        results = await clients[name](rig.address, keys.test, EAGER, calls)
        for (_, prompt), ended in zip(calls, results, strict=True):
            assert ended.status == "OK", (name, prompt, ended)
            assert ended.content
            assert rig.tasks.attempts[prompt] == 3, name
            assert 1.9 < ended.seconds < 25, "the server asked for 1 s each time, the policy for 30 s"

    await asyncio.gather(*map(check, clients))


async def test_a_lasting_error_is_retried_as_often_as_the_policy_allows(
    clients: dict[str, Client], rig: Rig, keys: Keys
) -> None:
    async def check(name: str) -> None:
        codes = ["overloaded", "rate_limit_exceeded"]
        calls = calls_of("RunTask", codes, times=99) + calls_of("StreamTask", codes, times=99)
        results = await clients[name](rig.address, keys.test, PLAIN, calls)
        for (_, prompt), ended in zip(calls, results, strict=True):
            code = prompt.split()[0]
            assert (ended.status, ended.code) == (TABLE[code].status, code), name
            assert rig.tasks.attempts[prompt] == ATTEMPTS, name

    await asyncio.gather(*map(check, clients))


@METHOD
@pytest.mark.parametrize("config", [PLAIN, EAGER], ids=["plain", "eager"])
async def test_a_permanent_error_is_not_retried(
    client: Client, method: str, config: str, rig: Rig, keys: Keys
) -> None:
    calls = calls_of(method, FINAL, times=1)
    for (_, prompt), ended in zip(calls, await client(rig.address, keys.test, config, calls), strict=True):
        code = prompt.split()[0]
        assert (ended.status, ended.code) == (TABLE[code].status, code)
        assert rig.tasks.attempts[prompt] == 1
        assert ended.seconds < 25


def test_every_error_is_either_retryable_or_final() -> None:
    assert RETRYABLE == [
        "concurrency_limit_exceeded", "idempotency_conflict", "overloaded", "provider_unavailable",
        "rate_limit_exceeded", "server_unavailable", "shutting_down", "store_unavailable",
        "token_limit_exceeded",
    ]  # fmt: skip


# --- a provider that fails


class DownAtFirst:
    """A vendor that responds to the first requests with 503."""

    def __init__(self, failures: int) -> None:
        self._failures = failures
        self.requests = 0

    def __call__(self, received: Received) -> Reply:
        self.requests += 1
        return error_reply(503, "down") if self.requests <= self._failures else Answer("one two")(received)


running_app = app_fixture()


async def test_a_task_that_succeeds_on_a_retry_is_billed_once(
    clients: dict[str, Client], running_app: RunningApp
) -> None:
    async def check(name: str) -> None:
        caller = await running_app.account()
        calls, vendors = [], []
        for method in ("RunTask", "StreamTask"):
            calls.append((method, f"down for a while {method} {time.monotonic_ns()}"))
            vendors.append(DownAtFirst(ROUTE_ATTEMPTS))
            running_app.upstream.when(calls[-1][1], vendors[-1])
        assert running_app.server.grpc is not None
        for ended in await clients[name](running_app.server.grpc, caller.live, PLAIN, calls):
            assert (ended.status, ended.content) == ("OK", "one two"), name
        assert [vendor.requests for vendor in vendors] == [ROUTE_ATTEMPTS + 1] * 2, name
        records = await running_app.records(caller)
        assert [record.complete for record in records] == [True, True], name
        assert (await running_app.balance(caller, live=True)).held == 0

    await asyncio.gather(*map(check, clients))


async def test_a_stream_that_fails_after_the_first_event_is_not_retried(
    client: Client, app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    (ended,) = await client(app.grpc or "", keys.test, EAGER, [("StreamTask", "[[words:30]] [[cut]]")])
    assert (ended.status, ended.code) == ("UNAVAILABLE", "provider_failed")
    assert ended.content


class KeyLookups(ConnectionObserver):
    """Sets `done` after that many key look-ups."""

    def __init__(self, until: int) -> None:
        self._left = until
        self.done = asyncio.Event()

    def checked(self, peer: str) -> None:
        self._left -= 1
        if not self._left:
            self.done.set()


async def test_calls_refused_during_a_shutdown_succeed_on_the_next_server(
    client: Client, app: App, keys: Keys
) -> None:
    address = f"127.0.0.1:{free_port()}"
    draining, refused = Draining(), KeyLookups(2)
    draining.drain()
    options = ServerOptions(address, grace=1.0)
    async with asyncio.timeout(20):
        async with open_server(draining.guard(app.services), options, connections=refused):
            requests = [("RunTask", "Hello"), ("StreamTask", "Hello")]
            calls = asyncio.create_task(client(address, keys.test, PLAIN, requests))
            await refused.done.wait()
        async with open_server(app.services, options, connections=ConnectionObserver()):
            for ended in await calls:
                assert ended.status == "OK"
                assert ended.seconds > 0.9, "the first attempt is refused with a wait of one second"


# --- on the network


@pytest.mark.parametrize("code", sorted(TABLE))
@METHOD
async def test_every_refusal_is_one_headers_frame_that_ends_the_stream(
    method: str, code: str, rig: Rig, keys: Keys
) -> None:
    host, _, port = rig.address.rpartition(":")
    request = RunTaskRequest if method == "RunTask" else StreamTaskRequest
    async with http2.connect(host, int(port)) as connection, asyncio.timeout(20):
        for _, prompt in calls_of(method, [code], times=1):
            call = connection.begin(f"/pomelo.v1.TaskService/{method}", bearer(keys.test))
            data = request(spec=text_task(prompt)).SerializeToString()
            await connection.send(call, http2.prefixed(data), end=True)
            await connection.over(call)
            assert call.frames == [(frames.HEADERS, frames.END_STREAM | frames.END_HEADERS)]
