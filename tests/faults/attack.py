"""Calls that are begun and never finished, and how two good callers fare meanwhile."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import grpc

from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from tests.faults import http2
from tests.serving import Served

MIB = 1024 * 1024
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
LIST_MODELS = "/pomelo.v1.ModelService/ListModels"
RUN_TASK = "/pomelo.v1.TaskService/RunTask"
UPLOAD = "/pomelo.v1.MediaService/UploadMedia"
DOWNLOAD = "/pomelo.v1.MediaService/DownloadMedia"
HALF = http2.prefixed(b"\x0a" * (9 * MIB - 100_000), size=9 * MIB)
"""8.9 of 9 MiB."""


def flood(size: int) -> bytes:
    """A RunTask of about so many bytes, all of them empty messages."""
    return _nested(_nested(b"\x0a\x00" * (size // 2), 2), 1)


def _nested(inner: bytes, field_number: int) -> bytes:
    size, head = len(inner), bytearray((field_number << 3 | 2,))
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*head, size)) + inner


BOMB = http2.prefixed(gzip.compress(flood(9_400_000)), compressed=True)
"""4.7 million empty messages in 9 KB."""


@dataclass
class Good:
    """What good callers saw: the longest wait of each, and what was refused."""

    waits: dict[str, float] = field(default_factory=lambda: {"rest": 0.0, "grpc": 0.0})
    count: int = 0
    refused: list[str] = field(default_factory=list)


@asynccontextmanager
async def good_callers(served: Served, key: str) -> AsyncIterator[Good]:
    """One caller of each protocol who asks for the models, again and again."""
    good = Good()
    over = asyncio.Event()

    async def rest() -> None:
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            while not over.is_set():
                began = time.monotonic()
                async with session.get(f"{served.url}/api/v1/models") as answer:
                    await answer.read()
                    note("rest", began, "" if answer.status == 200 else str(answer.status))
                await asyncio.sleep(0.02)

    async def over_grpc() -> None:
        async with grpc.aio.insecure_channel(
            f"{served.host}:{served.grpc_port}", [("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            stub, metadata = ModelServiceStub(channel), [("authorization", f"Bearer {key}")]
            while not over.is_set():
                began = time.monotonic()
                call = stub.ListModels(ListModelsRequest(), metadata=metadata, timeout=20)
                status = await call.code()
                note(
                    "grpc", began, "" if status == grpc.StatusCode.OK else f"{status} {await call.details()}"
                )
                await asyncio.sleep(0.02)

    def note(protocol: str, began: float, refused: str) -> None:
        good.waits[protocol] = max(good.waits[protocol], time.monotonic() - began)
        good.count += 1
        if refused:
            good.refused.append(refused)

    callers = [asyncio.ensure_future(rest()), asyncio.ensure_future(over_grpc())]
    try:
        yield good
    finally:
        over.set()
        await asyncio.gather(*callers)


class Attack:
    """Connections, and the calls on them."""

    def __init__(self, served: Served, connections: list[http2.Connection]) -> None:
        self._served = served
        self._connections = connections
        self.calls: list[tuple[http2.Connection, http2.Stream]] = []
        self._sending: list[asyncio.Future[int]] = []

    def begin(
        self,
        count: int,
        path: str,
        metadata: Iterable[tuple[str, str]] = (),
        data: bytes = b"",
        *,
        end: bool = False,
    ) -> None:
        """Begins so many calls; of each `data` goes out as the windows allow, and no more unless `end`."""
        for number in range(count):
            connection = self._connections[number % len(self._connections)]
            call = connection.begin(path, metadata)
            self.calls.append((connection, call))
            if data:
                self._sending.append(asyncio.ensure_future(connection.send(call, data, end=end)))

    async def show(self, key: str) -> None:
        """Shows a good key on each connection, by a call that is answered: the guard of connections leaves
        them to the limits of calls then."""
        for connection in self._connections:
            call = connection.begin(LIST_MODELS, [("authorization", f"Bearer {key}")])
            await connection.send(call, http2.prefixed(b""), end=True)
            await connection.over(call)

    async def over(self) -> None:
        """Returns when every call is over."""
        for connection, call in self.calls:
            await connection.over(call)

    async def sent(self, count: int) -> None:
        """Returns when all that so many calls should send has gone out."""
        while sum(one.done() for one in self._sending) < count:
            await asyncio.wait(
                [one for one in self._sending if not one.done()], return_when="FIRST_COMPLETED"
            )

    def longest(self) -> float:
        """Seconds that the longest call took."""
        return max(call.lasted for _, call in self.calls)

    def end(self) -> None:
        """Stops sending."""
        for sending in self._sending:
            sending.cancel()


@asynccontextmanager
async def attack(served: Served, connections: int = 10) -> AsyncIterator[Attack]:
    """Opens so many connections."""
    opened = [http2.connect(served.host, served.grpc_port) for _ in range(connections)]
    entered = [await one.__aenter__() for one in opened]
    attacking = Attack(served, entered)
    try:
        yield attacking
    finally:
        attacking.end()
        for one in opened:
            await one.__aexit__(None, None, None)
