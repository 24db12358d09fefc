"""Retry policies of gRPC clients: of grpcio, blocking and with asyncio, and of Node's @grpc/grpc-js.

The clients are as their users configure them: a service config in the channel's options, nothing of ours.
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
from pomelo.draining import Draining
from pomelo.engine.routing import RETRIES
from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, StreamTaskResponse
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.server.limits import Connections
from pomelo.server.server import ServerOptions, open_server
from pomelo.service import TaskService
from pomelo.testing import Answer, FaultUpstream, Received, Reply, error_reply
from tests import node_client
from tests.app import RunningApp, run_app
from tests.calls import bearer, reason_of
from tests.conftest import Keys
from tests.faults import frames, http2
from tests.ports import free_port
from tests.tasks import text_task

ATTEMPTS = 4

EVERY_CODE = sorted({row.status for row in TABLE.values()})


def policy(codes: list[str]) -> str:
    """A service config that retries after 30 s, unless the server asks for another wait."""
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
"""Would retry every error: what isn't retried was forbidden by the server."""

METHODS = pytest.mark.parametrize("method", ["RunTask", "StreamTask"])

MENDS = sorted(
    code for code, row in TABLE.items() if row.http in (409, 429, 503) and code not in {"provider_not_configured", "idempotency_mismatch"}
)  # fmt: skip
FINAL = sorted(set(TABLE) - set(MENDS))


@dataclass
class Ended:
    """How a call ended for its caller: the status's name, the code in its details, the text, and the seconds."""

    status: str
    code: str
    content: str
    seconds: float


Client = Callable[[str, str, str, list[tuple[str, str]]], Coroutine[Any, Any, list[Ended]]]
"""Makes calls concurrently: address, key, service config, (method, prompt) of each."""


async def with_asyncio(address: str, key: str, config: str, calls: list[tuple[str, str]]) -> list[Ended]:
    """The client of grpc.aio."""

    async def one(method: str, prompt: str) -> Ended:
        content, began = "", time.monotonic()
        try:
            if method == "RunTask":
                request = RunTaskRequest(task=text_task(prompt))
                content = (await stub.RunTask(request, metadata=bearer(key))).result.text.content
            else:
                streamed = StreamTaskRequest(task=text_task(prompt))
                async for event in stub.StreamTask(streamed, metadata=bearer(key)):
                    content += event.text_delta.content
        except grpc.aio.AioRpcError as error:
            return Ended(error.code().name, reason_of(error), content, time.monotonic() - began)
        return Ended("OK", "", content, time.monotonic() - began)

    async with grpc.aio.insecure_channel(address, options=options(config)) as channel:
        stub = TaskServiceStub(channel)
        return await asyncio.gather(*[one(*call) for call in calls])


async def blocking(address: str, key: str, config: str, calls: list[tuple[str, str]]) -> list[Ended]:
    """The client of grpc, with a thread for each call."""

    def one(method: str, prompt: str) -> Ended:
        content, began = "", time.monotonic()
        try:
            if method == "RunTask":
                request = RunTaskRequest(task=text_task(prompt))
                content = stub.RunTask(request, metadata=bearer(key)).result.text.content
            else:
                streamed = StreamTaskRequest(task=text_task(prompt))
                for event in stub.StreamTask(streamed, metadata=bearer(key)):
                    content += event.text_delta.content
        except grpc.RpcError as error:
            return Ended(error.code().name, reason_of(error), content, time.monotonic() - began)
        return Ended("OK", "", content, time.monotonic() - began)

    with grpc.insecure_channel(address, options(config)) as channel, ThreadPoolExecutor(len(calls)) as pool:
        stub = TaskServiceStub(channel)
        return await asyncio.to_thread(lambda: list(pool.map(lambda call: one(*call), calls)))


def with_node(modules: Path) -> Client:
    """The client of Node."""

    async def client(address: str, key: str, config: str, calls: list[tuple[str, str]]) -> list[Ended]:
        given = {
            "proto": str(node_client.FOLDER.parents[1] / "proto"),
            "address": address,
            "key": key,
            "policy": config,
            "calls": [
                {"id": str(n), "method": method, "prompt": prompt} for n, (method, prompt) in enumerate(calls)
            ],
        }
        found = await node_client.run(modules, "retries.cjs", given)
        return [
            Ended(one["code"], _code(b64decode(one["details"])), one["content"], one["seconds"])
            for one in (found[str(n)] for n in range(len(calls)))
        ]

    return client


def _code(details: bytes) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(details).details:
        detail.Unpack(info)
    return info.reason.lower()


def options(config: str) -> list[tuple[str, Any]]:
    """Options of a Python channel with a connection of its own."""
    return [("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(scope="module", params=["asyncio", "blocking", "node"])
def client(request: pytest.FixtureRequest) -> Client:
    """Each client."""
    if request.param == "node":
        return with_node(node_client.install(Path(request.config.cache.mkdir("node"))))
    return with_asyncio if request.param == "asyncio" else blocking


class Failing:
    """The tasks of an app, whose first attempts fail: the prompt is `CODE TIMES where`, its attempts are
    counted. `where` is `entering` or, in a stream, `first`: before the first event."""

    def __init__(self, inner: TaskService) -> None:
        self._inner = inner
        self.attempts: Counter[str] = Counter()

    def _fails(self, task: Task, where: str) -> None:
        prompt = task.text.messages[0].content
        code, times, place = prompt.split()[:3]
        if place == where:
            self.attempts[prompt] += 1
            if self.attempts[prompt] <= int(times):
                wait = 1 if TABLE[code].retry_after is not None else None
                raise PomeloError(code, retry_after=wait)

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """See the port."""
        self._fails(task, "entering")
        return await self._inner.run_task(task, call)

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[StreamTaskResponse]]:
        """See the port."""
        self._fails(task, "entering")
        async with self._inner.stream_task(task, call) as events:
            yield self._events(task, events)

    async def _events(
        self, task: Task, events: AsyncIterator[StreamTaskResponse]
    ) -> AsyncIterator[StreamTaskResponse]:
        self._fails(task, "first")
        async for event in events:
            yield event


@dataclass
class Rig:
    """A server whose tasks fail."""

    address: str
    tasks: Failing


@pytest.fixture(scope="module", name="rig")
async def _rig(app: App) -> AsyncIterator[Rig]:
    tasks = Failing(app.services.tasks)
    services = replace(app.services, tasks=tasks)
    async with open_server(services, ServerOptions("127.0.0.1:0"), connections=Connections()) as server:
        yield Rig(server.address, tasks)


def calls_of(method: str, codes: list[str], times: int) -> list[tuple[str, str]]:
    """Calls that fail with each code that often; for a stream at both places."""
    places = ["entering"] if method == "RunTask" else ["entering", "first"]
    return [(method, f"{code} {times} {place} {time.monotonic_ns()}") for code in codes for place in places]


async def test_an_error_that_passes_is_retried_after_the_wait_that_the_server_asks_for(
    client: Client, rig: Rig, keys: Keys
) -> None:
    calls = calls_of("RunTask", MENDS, times=2) + calls_of("StreamTask", MENDS, times=2)
    for (_, prompt), ended in zip(calls, await client(rig.address, keys.test, EAGER, calls), strict=True):
        assert ended.status == "OK", (prompt, ended)
        assert ended.content
        assert rig.tasks.attempts[prompt] == 3
        assert 1.9 < ended.seconds < 10, "the server asked for 1 s each time, the policy for 30 s"


async def test_an_error_that_stays_is_retried_as_often_as_the_policy_says(
    client: Client, rig: Rig, keys: Keys
) -> None:
    codes = ["overloaded", "rate_limit_exceeded"]
    calls = calls_of("RunTask", codes, times=99) + calls_of("StreamTask", codes, times=99)
    for (_, prompt), ended in zip(calls, await client(rig.address, keys.test, PLAIN, calls), strict=True):
        code = prompt.split()[0]
        assert (ended.status, ended.code) == (TABLE[code].status, code)
        assert rig.tasks.attempts[prompt] == ATTEMPTS


@METHODS
@pytest.mark.parametrize("config", [PLAIN, EAGER], ids=["plain", "eager"])
async def test_an_error_that_no_retry_mends_is_not_retried(
    client: Client, method: str, config: str, rig: Rig, keys: Keys
) -> None:
    calls = calls_of(method, FINAL, times=1)
    for (_, prompt), ended in zip(calls, await client(rig.address, keys.test, config, calls), strict=True):
        code = prompt.split()[0]
        assert (ended.status, ended.code) == (TABLE[code].status, code)
        assert rig.tasks.attempts[prompt] == 1
        assert ended.seconds < 5


def test_every_error_is_either_worth_a_retry_or_not() -> None:
    assert MENDS == [
        "concurrency_limit_exceeded", "idempotency_conflict", "overloaded", "provider_unavailable",
        "rate_limit_exceeded", "server_unavailable", "shutting_down", "store_unavailable",
        "token_limit_exceeded",
    ]  # fmt: skip


# --- a provider that fails


class DownAtFirst:
    """A vendor that answers 503 to the first requests."""

    def __init__(self, failures: int) -> None:
        self._failures = failures
        self.asked = 0

    def __call__(self, received: Received) -> Reply:
        """The reply to a request."""
        self.asked += 1
        return error_reply(503, "down") if self.asked <= self._failures else Answer("one two")(received)


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("retries")) as opened:
        yield opened


async def test_a_task_whose_provider_was_down_is_billed_once_when_a_retry_succeeds(
    client: Client, house: RunningApp
) -> None:
    caller = await house.account()
    calls, vendors = [], []
    for method in ("RunTask", "StreamTask"):
        calls.append((method, f"down for a while {method} {time.monotonic_ns()}"))
        vendors.append(DownAtFirst(RETRIES + 1))
        house.upstream.when(calls[-1][1], vendors[-1])
    assert house.server.grpc is not None
    for ended in await client(house.server.grpc, caller.live, PLAIN, calls):
        assert (ended.status, ended.content) == ("OK", "one two")
    assert [vendor.asked for vendor in vendors] == [RETRIES + 2] * 2
    records = await house.records(caller)
    assert [record.complete for record in records] == [True, True]
    assert (await house.balance(caller, live=True)).held == 0


async def test_a_stream_that_breaks_after_the_first_byte_is_not_retried(
    client: Client, app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    (ended,) = await client(app.grpc or "", keys.test, EAGER, [("StreamTask", "[[words:30]] [[cut]]")])
    assert (ended.status, ended.code) == ("UNAVAILABLE", "provider_failed")
    assert ended.content


class Checked(Connections):
    """Counts the keys that were looked up."""

    def __init__(self, until: int) -> None:
        self._left = until
        self.enough = asyncio.Event()

    def checked(self, peer: str) -> None:
        """See the base class."""
        self._left -= 1
        if not self._left:
            self.enough.set()


async def test_calls_that_a_server_refuses_while_it_shuts_down_run_on_the_one_that_replaces_it(
    client: Client, app: App, keys: Keys
) -> None:
    address = f"127.0.0.1:{free_port()}"
    draining, refused = Draining(), Checked(2)
    draining.drain()
    options = ServerOptions(address, grace=1.0)
    async with asyncio.timeout(20):
        async with open_server(draining.guard(app.services), options, connections=refused):
            given = [("RunTask", "Hello"), ("StreamTask", "Hello")]
            calls = asyncio.create_task(client(address, keys.test, PLAIN, given))
            await refused.enough.wait()
        async with open_server(app.services, options, connections=Connections()):
            for ended in await calls:
                assert ended.status == "OK"
                assert ended.seconds > 0.9, "it was refused once, and asked to wait for a second"


# --- on the network


@pytest.mark.parametrize("code", sorted(TABLE))
@METHODS
async def test_every_refusal_is_one_headers_frame_that_ends_the_stream(
    method: str, code: str, rig: Rig, keys: Keys
) -> None:
    host, _, port = rig.address.rpartition(":")
    request = RunTaskRequest if method == "RunTask" else StreamTaskRequest
    async with http2.connect(host, int(port)) as connection, asyncio.timeout(10):
        for _, prompt in calls_of(method, [code], times=1):
            call = connection.begin(f"/pomelo.v1.TaskService/{method}", bearer(keys.test))
            data = request(task=text_task(prompt)).SerializeToString()
            await connection.send(call, http2.prefixed(data), end=True)
            await connection.over(call)
            assert call.frames == [(frames.HEADERS, frames.END_STREAM | frames.END_HEADERS)]
