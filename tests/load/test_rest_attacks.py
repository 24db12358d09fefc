"""REST under attack: by callers without a key, by the holder of a free key, and by concurrent requests.

The server is `pomelo serve`, the attackers are processes of their own, and the callers who should not notice are
here. `make load` runs them at full size (1,300 unauthenticated connections, 3,000 concurrent requests), `make test`
a fifth of that. Time limits allow for a busy machine: an idle one needs a tenth.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.errors import TABLE
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from tests.integration.commands import pomelo
from tests.load.memory import MIB, resident, watched
from tests.serving import Served, serve

CALLS = int(os.environ.get("LOAD_CALLS", "20"))
"""Connections of each kind of attack; thirty times as many requests are sent concurrently."""

HOLDERS = max(8, CALLS // 4)
"""Connections of each kind of attack with the free key, whose plan has 20 requests a minute."""

BODY = json.dumps({"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}).encode()

pytestmark = pytest.mark.timeout(120)


@dataclass
class Seen:
    """What the callers and the attackers saw. Waits are in seconds."""

    strangers: dict[str, Any] = field(default_factory=dict)
    holder: dict[str, Any] = field(default_factory=dict)
    rest: list[float] = field(default_factory=list)
    grpc: list[float] = field(default_factory=list)
    refused: list[Any] = field(default_factory=list)
    guest: int = 0
    growth: int = 0


@pytest.fixture(scope="module", name="served")
async def _served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serve(tmp_path_factory.mktemp("attacked")) as process:
        yield process


async def attack(served: Served, *key: str) -> dict[str, Any]:
    """Runs the attackers to their end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.load.rest_attacks", served.host, str(served.port)),
        *(str(HOLDERS if key else CALLS), *key),
        stdout=asyncio.subprocess.PIPE,
    )
    printed, _ = await process.communicate()
    report: dict[str, Any] = json.loads(printed)
    return report


async def again(ask: Callable[[], Awaitable[object]], waits: list[float], seen: Seen) -> None:
    """Asks now and then, until it is cancelled."""
    while True:
        begin = time.monotonic()
        refusal = await ask()
        waits.append(time.monotonic() - begin)
        if refusal is not None:
            seen.refused.append(refusal)
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module", name="seen")
async def _seen(served: Served) -> Seen:
    """Both attacks, at the same time, beside callers with a good key."""
    seen = Seen()
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "guest", "--plan", "free")).status == 0
    guest = (await pomelo(folder, "keys", "create", "guest")).out.split()[-1]
    metadata = (("authorization", f"Bearer {served.key}"),)
    async with (
        aiohttp.ClientSession(headers=served.headers) as kept,
        grpc.aio.insecure_channel(f"{served.host}:{served.grpc_port}") as channel,
    ):
        models = ModelServiceStub(channel)

        async def by_rest() -> object:
            async with kept.get(f"{served.url}/api/v1/account") as answer:
                return None if answer.status == 200 else await answer.text()

        async def by_rest_anew() -> object:
            async with (
                aiohttp.ClientSession(headers=served.headers) as session,
                session.get(f"{served.url}/api/v1/models/gpt-4") as answer,
            ):
                return None if answer.status == 200 else await answer.text()

        async def by_grpc() -> object:
            try:
                await models.ListModels(ListModelsRequest(), metadata=metadata, timeout=30)
            except grpc.aio.AioRpcError as error:
                return error
            return None

        for ask in (by_rest, by_rest_anew, by_grpc):
            assert await ask() is None
        async with kept.post(f"{served.url}/api/v1/task", data=BODY, headers=JSON) as answer:
            assert answer.status == 200
        before = resident(served.pid)
        callers = [
            asyncio.create_task(again(ask, waits, seen))
            for ask, waits in ((by_rest, seen.rest), (by_rest_anew, seen.rest), (by_grpc, seen.grpc))
        ]
        with watched(served.pid) as peak:
            seen.strangers, seen.holder = await asyncio.gather(attack(served), attack(served, guest))
        seen.growth = peak.most - before
        headers = {"Authorization": f"Bearer {guest}", **JSON}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{served.url}/api/v1/task", data=BODY, headers=headers) as answer,
        ):
            seen.guest = answer.status
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
    say(seen)
    return seen


JSON = {"Content-Type": "application/json"}


def say(seen: Seen) -> None:
    """Prints what was measured; `pytest -s` shows it."""
    lines = [f"{name}: {report}" for kind in (seen.strangers, seen.holder) for name, report in kind.items()]
    for name, waits in (("REST", seen.rest), ("gRPC", seen.grpc)):
        waits.sort()
        lines.append(
            f"{name}: {len(waits)} calls, median {waits[len(waits) // 2]:.3f} s, worst {waits[-1]:.3f} s"
        )
    print("", *lines, f"memory: {seen.growth / MIB:+.0f} MiB", sep="\n")  # noqa: T201


def test_every_unauthenticated_connection_is_closed_in_ten_seconds_and_got_nothing(seen: Seen) -> None:
    for name, report in seen.strangers.items():
        assert report["longest"] < 12.0, (name, report)  # 8 s and some; 2 s for a busy machine
        assert set(report["statuses"]) <= {"400", "401", "404", "429", "503"}, (name, report)
    for name in ("slow_body", "tiny_chunks", "expecting", "preamble", "values"):
        assert set(seen.strangers[name]["statuses"]) <= {"401", "429", "503"}


def test_memory_hardly_grows(seen: Seen) -> None:
    assert seen.growth < 64 * MIB


def test_callers_with_a_good_key_are_never_refused_and_hardly_wait(seen: Seen) -> None:
    assert not seen.refused
    assert len(seen.rest) > 20
    assert len(seen.grpc) > 10
    assert max(seen.rest) < 3.0
    assert max(seen.grpc) < 3.0


def test_the_holder_of_a_free_key_is_refused_soon_and_by_its_limits(seen: Seen) -> None:
    for name, report in seen.holder.items():
        assert report["longest"] < 15.0, (name, report)  # a body may be slow for 10 s
        assert set(report["statuses"]) <= {"100", "400", "429", "503"}, (name, report)
    refusals = len(seen.holder) * HOLDERS  # each of a body that counts as a request
    assert seen.guest == (429 if refusals >= 20 else 200)


async def test_each_of_many_concurrent_requests_gets_a_documented_answer_and_health_answers(
    served: Served, seen: Seen
) -> None:
    request = (
        f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.key}\r\nContent-Type: "
        f"application/json\r\nContent-Length: {len(BODY)}\r\nConnection: close\r\n\r\n"
    ).encode() + BODY

    async def one() -> str:
        reader, writer = await asyncio.open_connection(served.host, served.port)
        writer.write(request)
        answer = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
        writer.close()
        return str(answer["error"]["code"]) if "error" in answer else "ok"

    code = (
        "import http.client,json,sys,time\nwaits=[]\n"
        "while not sys.stdin.closed and len(waits) < 10_000:\n"
        f"  begin=time.monotonic(); c=http.client.HTTPConnection({served.host!r}, {served.port}, timeout=30)\n"
        "  c.request('GET', '/healthz'); assert c.getresponse().status == 200; c.close()\n"
        "  waits.append(time.monotonic()-begin); time.sleep(0.02)\n"
        "  print(waits[-1], flush=True)\n"
    )
    probe = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert probe.stdout is not None
    await probe.stdout.readline()
    codes = collections.Counter(await asyncio.gather(*[one() for _ in range(30 * CALLS)]))
    probe.terminate()
    waits = sorted(float(line) for line in (await probe.stdout.read()).split())
    print(f"\n{dict(codes)}, health: median {waits[len(waits) // 2]:.3f} s, worst {waits[-1]:.3f} s")  # noqa: T201
    assert sum(codes.values()) == 30 * CALLS
    assert codes.keys() <= TABLE.keys() | {"ok"}
    assert codes["ok"] > 0
    assert await probe.wait() == -15  # ended by our SIGTERM, not by a failed assertion
    assert "Traceback" not in served.log()
    assert waits[len(waits) // 2] < 0.25
    assert waits[-1] < 2.5
