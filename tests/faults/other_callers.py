"""Callers with a valid key, in a process of their own: a busy attacker must not look like a busy server.

Run as `python -m tests.faults.other_callers URL ADDRESS KEY PID CALLER...`: each caller lists the models,
repeatedly, until stdin ends; then the process prints how long the calls took, and their errors.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from statistics import median

import aiohttp
import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from tests.calls import bearer
from tests.load.child_process import print_line, start_child, stdin_end
from tests.load.process_usage import queued_seconds
from tests.serving import Served

PAUSE = 0.02
"""Seconds between two calls on one connection."""

RECONNECT_PAUSE = 0.1
"""Seconds between two calls that open a connection each."""

MIN_CALLS = 8
"""Calls of each caller, even if stdin ends earlier: a median of fewer is noise on a busy machine."""

MAX_WAIT = 2.0
"""Seconds; twice the promised maximum, for a busy machine."""

MAX_MEDIAN_WAIT = 0.25


@dataclass
class Callers:
    """The seconds that each call took, by caller, and all errors. The time for which the server or this process
    waited for a processor is not included: it depends on what else runs on the machine."""

    waits: dict[str, list[float]]
    errors: list[str] = field(default_factory=list)

    @property
    def all_waits(self) -> list[float]:
        return [wait for waits in self.waits.values() for wait in waits]

    def check(self) -> None:
        """Checks that all calls succeeded, and how long they took."""
        assert not self.errors
        for waits in self.waits.values():
            assert len(waits) >= MIN_CALLS
            assert max(waits) < MAX_WAIT
            assert median(waits) < MAX_MEDIAN_WAIT


@asynccontextmanager
async def other_callers(served: Served, *names: str) -> AsyncIterator[Callers]:
    """Runs callers while the body runs: "rest", "grpc", or with a new connection for each call "new_rest",
    "new_grpc"; "rest_health", "grpc_health" ask for the health. Their waits and errors are filled in when the body
    has ended."""
    callers = Callers({})
    address = f"{served.host}:{served.grpc_port}"
    arguments = (served.url, address, served.key, str(served.pid), *names)
    async with start_child("tests.faults.other_callers", *arguments) as child:
        yield callers
    for name, value in json.loads(child.result).items():
        setattr(callers, name, value)


async def run(url: str, address: str, key: str, pid: str, *names: str) -> Callers:
    callers = Callers({name: [] for name in names})
    end = stdin_end()
    ready = asyncio.Barrier(len(names) + 1)
    headers, metadata = {"Authorization": f"Bearer {key}"}, bearer(key)

    def clock() -> float:
        """Time that stands still while the server or this process waits for a processor."""
        return time.monotonic() - queued_seconds(int(pid)) - queued_seconds(os.getpid())

    async def repeat(waits: list[float], call: Callable[[], Awaitable[str]], pause: float) -> None:
        await call()  # one-time work, such as connecting, does not count as a wait
        await ready.wait()
        while len(waits) < MIN_CALLS or not end.done():
            began = clock()
            error = await call()
            waits.append(clock() - began)
            if error:
                callers.errors.append(error)
            await asyncio.sleep(pause)

    async def rest(session: aiohttp.ClientSession, path: str = "/api/v1/models") -> str:
        try:
            async with session.get(url + path) as response:
                await response.read()
                return "" if response.status == 200 else str(response.status)
        except aiohttp.ClientError as error:
            return repr(error)

    async def over_grpc(call: grpc.aio.UnaryUnaryCall) -> str:
        code = await call.code()
        return "" if code == grpc.StatusCode.OK else f"{code} {await call.details()}"

    async def models(channel: grpc.aio.Channel) -> str:
        call = ModelServiceStub(channel).ListModels(ListModelsRequest(), metadata=metadata, timeout=20)
        return await over_grpc(call)

    async def health(channel: grpc.aio.Channel) -> str:
        return await over_grpc(HealthStub(channel).Check(HealthCheckRequest(), timeout=10))

    async def new_rest(path: str = "/api/v1/models") -> str:
        async with aiohttp.ClientSession(headers=headers) as new_session:
            return await rest(new_session, path)

    async def new_grpc() -> str:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as new_channel:
            return await models(new_channel)

    async with (
        aiohttp.ClientSession(headers=headers) as session,
        grpc.aio.insecure_channel(address) as channel,
        asyncio.TaskGroup() as group,
    ):
        calls: dict[str, tuple[Callable[[], Awaitable[str]], float]] = {
            "rest": (lambda: rest(session), PAUSE),
            "grpc": (lambda: models(channel), PAUSE),
            "rest_health": (lambda: new_rest("/healthz"), PAUSE),
            "grpc_health": (lambda: health(channel), PAUSE),
            "new_rest": (new_rest, RECONNECT_PAUSE),
            "new_grpc": (new_grpc, RECONNECT_PAUSE),
        }
        for name, waits in callers.waits.items():
            group.create_task(repeat(waits, *calls[name]))
        await ready.wait()
        print_line("ready")
    return callers


if __name__ == "__main__":
    print_line(json.dumps(asdict(asyncio.run(run(*sys.argv[1:])))))
