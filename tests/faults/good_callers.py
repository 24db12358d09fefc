"""Two good callers in a process of their own, so that a busy attacker does not look like a busy server.

Run as `python -m tests.faults.good_callers URL ADDRESS KEY`: lists the models over both protocols, repeatedly,
until its stdin ends; then prints what they saw.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field

import aiohttp
import grpc

from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from tests.serving import Served

PAUSE = 0.02


@dataclass
class Good:
    """What they saw: the longest wait of each, how many answers in all, and what was refused."""

    waits: dict[str, float] = field(default_factory=lambda: {"rest": 0.0, "grpc": 0.0})
    count: int = 0
    refused: list[str] = field(default_factory=list)


@asynccontextmanager
async def good_callers(served: Served, key: str) -> AsyncIterator[Good]:
    """Lets them call while the body runs; what they saw is filled in at its end."""
    good = Good()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.good_callers",
        served.url, f"{served.host}:{served.grpc_port}", key,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.readline(), "both have had an answer"
    try:
        yield good
    finally:
        output, _ = await process.communicate(b"")
        for name, value in json.loads(output).items():
            setattr(good, name, value)


async def call(url: str, address: str, key: str) -> Good:
    """Calls until stdin ends."""
    good = Good()
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    answered = asyncio.Barrier(3)

    async def repeat(protocol: str, ask: Callable[[], Awaitable[str]]) -> None:
        await ask()  # one-time work, such as connecting, does not count as a wait
        await answered.wait()
        while not over.done():
            began = time.monotonic()
            refusal = await ask()
            good.waits[protocol] = max(good.waits[protocol], time.monotonic() - began)
            good.count += 1
            if refusal:
                good.refused.append(refusal)
            await asyncio.sleep(PAUSE)

    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub, metadata = ModelServiceStub(channel), [("authorization", f"Bearer {key}")]

        async def rest() -> str:
            async with session.get(f"{url}/api/v1/models") as answer:
                await answer.read()
                return "" if answer.status == 200 else str(answer.status)

        async def over_grpc() -> str:
            asked = stub.ListModels(ListModelsRequest(), metadata=metadata, timeout=20)
            code = await asked.code()
            return "" if code == grpc.StatusCode.OK else f"{code} {await asked.details()}"

        callers = [
            asyncio.ensure_future(repeat("rest", rest)),
            asyncio.ensure_future(repeat("grpc", over_grpc)),
        ]
        await answered.wait()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.gather(*callers)
    return good


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(asyncio.run(call(*sys.argv[1:])))))
