"""A disk that fails while tasks end: no caller receives a false success, nothing is lost or charged twice.

One failure is a small, full file system in memory, if the system allows mounting one. The other is a limit on
the size of the server's files, which SQLite reports as a different error.
"""

from __future__ import annotations

import asyncio
import re
import resource
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.testing import FaultUpstream
from tests.calls import bearer, reason_of
from tests.faults.books import Books
from tests.faults.drivers import ChunkCounter, GrpcDriver, Outcome, RestDriver
from tests.faults.server_process import Deployment, ServerProcess
from tests.faults.vendor import Vendor, speech, text
from tests.waiting import first

CREDITS = 10**12
SMALL_DISK = "16m"
HARD_LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system limits no other process"),
]


class DiskFailure(ABC):
    """A failure of the disk of a deployment."""

    def mount(self, deployment: Deployment) -> None:  # noqa: B027
        """Moves a prepared deployment to the disk."""

    @abstractmethod
    async def begin(self, process: ServerProcess) -> None:
        """Starts the failure: nothing can be written."""

    @abstractmethod
    async def end(self, process: ServerProcess) -> None:
        """Ends the failure."""

    @abstractmethod
    async def end_without_server(self, deployment: Deployment) -> None:
        """Ends the failure while no server is running; before, no server can start."""

    def close(self) -> None:  # noqa: B027
        """Removes the disk."""


class FullDisk(DiskFailure):
    """A full disk: a small file system in memory, mounted over the folder of a deployment."""

    def __init__(self) -> None:
        self._holder: subprocess.Popen[bytes] | None = None

    def mount(self, deployment: Deployment) -> None:
        folder = deployment.data.parent
        mount = f"mount -t tmpfs -o size={SMALL_DISK} none '{folder}' && cp -a . '{folder}' && echo mounted && exec cat"
        try:
            self._holder = holder = subprocess.Popen(
                ["unshare", "-rm", "sh", "-c", mount],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        except OSError:
            pytest.skip("this system has no unshare")
        assert holder.stdout is not None
        inside = ("nsenter", "--preserve-credentials", "-U", "-m", "-t", str(holder.pid))
        if holder.stdout.readline() != b"mounted\n" or subprocess.run([*inside, "true"]).returncode:
            self.close()
            pytest.skip("this system does not allow mounting")
        deployment.command_prefix = inside

    async def begin(self, process: ServerProcess) -> None:
        await process.send("fill")

    async def end(self, process: ServerProcess) -> None:
        await process.send("empty")

    async def end_without_server(self, deployment: Deployment) -> None:
        # A server may start: what it must write may fit into the log that the dead one left.
        freeing = await asyncio.create_subprocess_exec(
            *deployment.command_prefix, "rm", deployment.data / "filler"
        )
        assert await freeing.wait() == 0

    def close(self) -> None:
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            self._holder.wait()


class FileSizeLimit(DiskFailure):
    """A limit of the process: no file can grow."""

    async def begin(self, process: ServerProcess) -> None:
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (0, HARD_LIMIT))

    async def end(self, process: ServerProcess) -> None:
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (HARD_LIMIT, HARD_LIMIT))

    async def end_without_server(self, deployment: Deployment) -> None:
        """The limit ended with the process, so another process gets it first."""
        deployment.command_prefix = ("sh", "-c", 'ulimit -f 0; exec "$@"', "sh")
        assert "File too large" in await start_error(deployment)
        deployment.command_prefix = ()


async def start_error(deployment: Deployment) -> str:
    """The error of a server that can't start. It must blame the disk, not the file."""
    dead = await deployment.start(expect_exit=True, stderr=subprocess.PIPE)
    assert dead.process.returncode == 1
    assert dead.process.stderr is not None
    message = (await dead.process.stderr.read()).decode()
    assert "can't be" in message
    assert "damaged" not in message
    return message


@pytest.fixture(params=[FullDisk, FileSizeLimit], ids=["full disk", "file size limit"])
def failure(request: pytest.FixtureRequest) -> Iterator[DiskFailure]:
    with closing(request.param()) as failure:
        yield failure


def body(name: str) -> dict[str, Any]:
    """A text or speech task, by its name."""
    return speech(name) if name.startswith("speech") else text(name)


def start_all_types(
    clients: tuple[RestDriver, GrpcDriver], watch: ChunkCounter, *, idempotent: bool = True
) -> dict[str, asyncio.Task[Outcome]]:
    """Starts a task of each type over each protocol. Returns them by name. `idempotent`: with an
    Idempotency-Key."""
    tasks = {}
    for task_type in ("text", "speech"):
        for client in clients:
            for stream in (False, True):
                name = f"{task_type}.{type(client).__name__}.{'stream' if stream else 'unary'}"
                key = name if idempotent else None
                call = client(body(name), name, stream=stream, idempotency_key=key, on_chunk=watch.add)
                tasks[name] = asyncio.create_task(call)
    return tasks


async def run_into_failure(
    failure: DiskFailure,
    clients: tuple[RestDriver, GrpcDriver],
    process: ServerProcess,
    upstream: FaultUpstream,
    vendor: Vendor,
) -> dict[str, Outcome]:
    """Runs a task before the failure, and tasks of each type that end during it; returns the outcomes of these."""
    assert (await clients[0](body("before"), "before")).complete
    await upstream.received()
    watch, gate = ChunkCounter(), vendor.hold()
    tasks = start_all_types(clients, watch)
    for _ in tasks:
        await upstream.received()
    await watch.wait_for(2 * 6 + 2 * 1)
    await failure.begin(process)
    gate.open()
    outcomes = {name: await task for name, task in tasks.items()}
    assert {result.code for result in outcomes.values()} == {"store_unavailable"}, outcomes
    assert not any(result.complete for result in outcomes.values())
    refused = [await client(body("text"), "refused") for client in clients]
    assert {refusal.code for refusal in refused} == {"store_unavailable"}
    assert vendor.calls["text"] == 0
    return outcomes


def check(books: Books, outcomes: dict[str, Outcome]) -> None:
    """A stream costs its delivered output; a unary task costs nothing."""
    books.check_idle()
    for name, result in outcomes.items():
        records = books.records.get(name, [])
        if not name.endswith("stream"):
            assert records == [], name
        for record in records:
            assert not record["complete"]
            assert record["output_tokens"] <= result.chunks
    assert set(books.records) <= {*outcomes, "before"}
    (before,) = books.records["before"]
    assert before["complete"]


async def check_repeated(
    clients: tuple[RestDriver, GrpcDriver],
    process: ServerProcess,
    outcomes: dict[str, Outcome],
    vendor: Vendor,
    first: Books,
) -> None:
    """A repeated request with the same Idempotency-Key is answered, and charged once."""
    for name in outcomes:
        stream = name.endswith("stream")
        for turn, client in enumerate(clients):
            repeated = await client(body(name), f"{name}.repeat{turn}", stream=stream, idempotency_key=name)
            assert repeated.complete, repeated
        assert vendor.calls[name] == 2
    books = await process.books()
    books.check_idle()
    for name in outcomes:
        repeats = [r for turn in (0, 1) for r in books.records.get(f"{name}.repeat{turn}", ())]
        assert [record["complete"] for record in repeats] == [True]
        assert books.records.get(name, []) == first.records.get(name, [])


@pytest.fixture
async def deployment(
    failure: DiskFailure, tmp_path: Path, upstream: FaultUpstream
) -> AsyncIterator[Deployment]:
    """A deployment on the failing disk."""
    (tmp_path / "disk").mkdir()
    async with await Deployment(tmp_path / "disk", upstream).prepare(CREDITS) as prepared:
        prepared.errors = tmp_path / "errors"
        failure.mount(prepared)
        yield prepared


async def test_tasks_that_end_during_a_disk_failure_are_settled_after_it(
    failure: DiskFailure, deployment: Deployment, upstream: FaultUpstream, vendor: Vendor
) -> None:
    process = await deployment.start(stderr=subprocess.DEVNULL)
    async with process.drivers() as clients:
        outcomes = await run_into_failure(failure, clients, process, upstream, vendor)
        assert await health(process, 503) == "store_unavailable"
        await failure.end(process)
        assert await health(process, 200) == ""
        books = await process.settled_books()
        check(books, outcomes)
        for name, result in outcomes.items():
            if name.endswith("stream"):
                (record,) = books.records[name]
                assert record["cost"] > 0
                assert record["output_tokens"] == (result.chunks if name.startswith("text") else 0)
        await check_repeated(clients, process, outcomes, vendor, books)


async def test_reservations_of_a_server_killed_on_a_full_disk_are_released_at_the_next_start(
    failure: DiskFailure, deployment: Deployment, upstream: FaultUpstream, vendor: Vendor
) -> None:
    process = await deployment.start(stderr=subprocess.DEVNULL)
    async with process.drivers() as clients:
        outcomes = await run_into_failure(failure, clients, process, upstream, vendor)
        books = await process.books()
        books.check()
        # A task without an entry in the file is released without it: one whose audio could not be stored.
        assert sum(task_id.startswith("task_") for task_id in books.held) == len(outcomes) / 2
        assert len(books.held) <= len(outcomes)
        process.kill()
        assert await process.wait() == -signal.SIGKILL
    await failure.end_without_server(deployment)
    process = await deployment.start()
    books = await process.books()
    check(books, outcomes)
    async with process.drivers() as clients:
        await check_repeated(clients, process, outcomes, vendor, books)


async def test_a_server_that_ends_during_a_disk_failure_names_the_tasks_that_it_could_not_charge(
    failure: DiskFailure, deployment: Deployment, upstream: FaultUpstream, vendor: Vendor
) -> None:
    process = await deployment.start(stderr=subprocess.PIPE)
    assert process.process.stderr is not None
    async with process.drivers() as clients:
        outcomes = await run_into_failure(failure, clients, process, upstream, vendor)
        process.process.terminate()
        log = (await process.process.stderr.read()).decode()
    assert await process.wait() == 0
    named = re.findall(r"The store did not confirm the end of task (\S+)", log)
    assert len(named) == len(set(named)) == len(outcomes), log


async def test_uploads_during_a_disk_failure_are_unavailable_and_leave_no_file(
    failure: DiskFailure, deployment: Deployment, vendor: Vendor
) -> None:
    process = await deployment.start(stderr=subprocess.DEVNULL, POMELO_DISK_RESERVE="0")
    async with aiohttp.ClientSession() as session, grpc.aio.insecure_channel(process.grpc) as channel:
        await failure.begin(process)
        for size in (10, 100_000, 3_000_000):
            assert await form(session, process, deployment, size) == (503, "store_unavailable")
            assert await upload(channel, deployment, size) == "UNAVAILABLE store_unavailable"
        assert await stored_files(deployment) == []
        await failure.end(process)
        assert await upload(channel, deployment, 100_000) == ""
        assert await form(session, process, deployment, 100_000) == (200, "")
        assert len(await stored_files(deployment)) == 1
    (await process.books()).check_idle()


async def test_media_leave_disk_space_for_the_ledger(
    deployment: Deployment, failure: DiskFailure, upstream: FaultUpstream, vendor: Vendor
) -> None:
    if not isinstance(failure, FullDisk):
        pytest.skip("only for a full disk")
    reserve = 6 * 1024 * 1024
    process = await deployment.start(stderr=subprocess.DEVNULL, POMELO_DISK_RESERVE=str(reserve))
    async with (
        aiohttp.ClientSession() as session,
        grpc.aio.insecure_channel(process.grpc) as channel,
        process.drivers() as clients,
    ):
        gate = vendor.hold()
        running = start_all_types(clients, ChunkCounter(), idempotent=False)
        for _ in running:
            await upstream.received()
        statuses = [await upload(channel, deployment, 1_000_000) for _ in range(16)]
        assert statuses[0] == ""
        assert statuses[-1] == "UNAVAILABLE store_unavailable"
        assert await form(session, process, deployment, 1_000_000) == (503, "store_unavailable")
        assert reserve - 500_000 < await free_bytes(deployment) < reserve + 1_000_000
        gate.open()
        outcomes = {name: await task for name, task in running.items()}
        assert {name: result.code for name, result in outcomes.items() if not result.complete} == {}
        for number in range(200):
            assert (await clients[number % 2](body("text"), f"more-{number}")).complete
    books = await process.books()
    books.check_idle()
    assert all(record["complete"] for name in outcomes for record in books.records[name])
    assert {f"more-{number}" for number in range(200)} <= set(books.records)


async def health(process: ServerProcess, status: int) -> str:
    """Waits until the server's health check answers with a status; returns the code of its error."""

    async def read(session: aiohttp.ClientSession) -> tuple[int, str]:
        async with session.get(f"{process.rest}/healthz") as answer:
            return answer.status, (await answer.json()).get("error", {}).get("code", "")

    async with aiohttp.ClientSession() as session:
        return (await first(lambda: read(session), lambda found: found[0] == status))[1]


async def form(
    session: aiohttp.ClientSession, process: ServerProcess, deployment: Deployment, size: int
) -> tuple[int, str]:
    """Uploads an audio file with a task. Returns the status and the error code."""
    data = aiohttp.FormData({"model": "eleven-labs-stt"})
    data.add_field("audio", b"OggS" + bytes(size), filename="a.ogg", content_type="audio/ogg")
    headers = {"Authorization": f"Bearer {deployment.key}"}
    async with session.post(f"{process.rest}/api/v1/task", data=data, headers=headers) as answer:
        return answer.status, (await answer.json()).get("error", {}).get("code", "")


async def upload(channel: grpc.aio.Channel, deployment: Deployment, size: int) -> str:
    """Uploads a file. Returns the status and the reason of the error; empty if it was stored."""
    requests = [UploadMediaRequest(header=UploadMediaHeader(content_type="audio/ogg"))]
    requests += [UploadMediaRequest(chunk=bytes(min(250_000, size - at))) for at in range(0, size, 250_000)]
    try:
        await MediaServiceStub(channel).UploadMedia(iter(requests), metadata=bearer(deployment.key))
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {reason_of(error)}"
    return ""


async def stored_files(deployment: Deployment) -> list[str]:
    return (await run_inside(deployment, "ls", "-A", str(deployment.data / "media"))).split()


async def free_bytes(deployment: Deployment) -> int:
    blocks, size = (await run_inside(deployment, "stat", "-f", "-c", "%a %S", str(deployment.data))).split()
    return int(blocks) * int(size)


async def run_inside(deployment: Deployment, *command: str) -> str:
    """Returns the output of a program that runs on the deployment's disk."""
    process = await asyncio.create_subprocess_exec(
        *deployment.command_prefix, *command, stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()
