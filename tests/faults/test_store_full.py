"""A disk in trouble when tasks end: nobody is told that all is well, nothing is lost or charged twice.

The disk is a small one of memory, in a namespace of its own, where the system lets us make one; and as an
error that SQLite meets otherwise, a limit on the size of the server's files.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.testing import Answer, FaultUpstream, Gate, Received, Reply, Speech, Transcript
from tests.calls import bearer, reason_of
from tests.faults.books import Books
from tests.faults.callers import Grpc, Rest, Told, Watch, callers
from tests.faults.house import House, Process, read_books

CREDITS = 10**12
WORDS = "one two three four five six"
SMALL_DISK = "16m"

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system limits no other process"),
]


class FullDisk:
    """A disk on which nothing is left: a small one of memory, mounted over a house's folder."""

    def __init__(self) -> None:
        self._holder: subprocess.Popen[bytes] | None = None

    def mount(self, house: House) -> None:
        """Puts a prepared house onto such a disk."""
        folder = house.data.parent
        mount = f"mount -t tmpfs -o size={SMALL_DISK} none '{folder}' && cp -a . '{folder}' && echo made && exec cat"
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
        if holder.stdout.readline() != b"made\n" or subprocess.run([*inside, "true"]).returncode:
            self.close()
            pytest.skip("this system lets us make no small disk")
        house.inside = inside

    async def begin(self, process: Process) -> None:
        """From now on nothing can be written."""
        await process.ask("fill")

    async def end(self, process: Process) -> None:
        """From now on it can."""
        await process.ask("empty")

    async def end_without_server(self, house: House) -> None:
        """The same, where none runs; until then none can start."""
        assert "disk is full" in await starting_fails(house)
        freeing = await asyncio.create_subprocess_exec(*house.inside, "rm", house.data / "filler")
        assert await freeing.wait() == 0

    def close(self) -> None:
        """Frees it."""
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            self._holder.wait()


class NoFileGrows:
    """No byte of a file can be written."""

    def mount(self, house: House) -> None:
        """Nothing is to be done."""

    async def begin(self, process: Process) -> None:
        """From now on nothing can be written."""
        _, most = resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (0, most))

    async def end(self, process: Process) -> None:
        """From now on it can."""
        _, most = resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (most, most))

    async def end_without_server(self, house: House) -> None:
        """The same; the limit ended with the process, so another one gets it first."""
        house.inside = ("sh", "-c", 'ulimit -f 0; exec "$@"', "sh")
        assert "File too large" in await starting_fails(house)
        house.inside = ()

    def close(self) -> None:
        """Nothing is to be freed."""


Trouble = FullDisk | NoFileGrows


async def starting_fails(house: House) -> str:
    """What a server says that can't start: that it is the disk's fault, not the file's."""
    dead = await house.start(fails=True, errors=subprocess.PIPE)
    assert dead.process.returncode == 1
    assert dead.process.stderr is not None
    said = (await dead.process.stderr.read()).decode()
    assert "can't be" in said
    assert "damaged" not in said
    return said


@pytest.fixture(params=[FullDisk, NoFileGrows], ids=["full disk", "no file grows"])
def trouble(request: pytest.FixtureRequest) -> Iterator[Trouble]:
    """What goes wrong with the disk."""
    made: Trouble = request.param()
    yield made
    made.close()


class Vendor:
    """Answers all but for the end, which waits for the gate."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.asked: Counter[str] = Counter()

    def __call__(self, received: Received) -> Reply:
        """The reply to a request."""
        if received.form is not None:
            return Transcript()(received)
        is_text = "messages" in received.body
        said = received.prompt if is_text else received.body["text"]
        self.asked[str(said).split()[0]] += 1
        if is_text:
            return Answer(WORDS, at={6: self.gate})(received)
        return Speech(at={1: self.gate})(received)


@pytest.fixture
def vendor(upstream: FaultUpstream) -> Iterator[Vendor]:
    """The playing vendors' director."""
    upstream.reset()
    upstream.default = director = Vendor()
    yield director
    upstream.default = None
    upstream.reset()


def body(name: str) -> dict[str, Any]:
    """A task, by its name: of text or of speech."""
    if name.startswith("speech"):
        return {"model": "eleven-labs-tts", "text": f"{name} Hello.", "voice": "adam"}
    return {"model": "gpt-4", "messages": [{"role": "user", "content": f"{name} Count."}]}


def all_kinds(
    wires: tuple[Rest, Grpc], watch: Watch, *, repeatable: bool = True
) -> dict[str, asyncio.Task[Told]]:
    """A task of each type over each protocol, by name; with `repeatable` also its Idempotency-Key."""
    tasks = {}
    for kind in ("text", "speech"):
        for wire in wires:
            for stream in (False, True):
                name = f"{kind}.{type(wire).__name__}.{'stream' if stream else 'whole'}"
                repeat_key = name if repeatable else None
                asking = wire(body(name), name, stream=stream, repeat_key=repeat_key, piece=watch.came)
                tasks[name] = asyncio.create_task(asking)
    return tasks


async def in_trouble(
    trouble: Trouble, wires: tuple[Rest, Grpc], process: Process, upstream: FaultUpstream, vendor: Vendor
) -> dict[str, Told]:
    """Lets tasks run until all but their end is there, and their ends meet the trouble."""
    watch = Watch()
    tasks = all_kinds(wires, watch)
    for _ in tasks:
        await upstream.received()
    await watch.reaches(2 * 6 + 2 * 1)
    await trouble.begin(process)
    vendor.gate.open()
    told = {name: await task for name, task in tasks.items()}
    assert {one.code for one in told.values()} == {"store_unavailable"}, told
    assert not any(one.whole for one in told.values())
    refused = [await wire(body("text"), "refused") for wire in wires]
    assert {one.code for one in refused} == {"store_unavailable"}
    assert vendor.asked["text"] == 0
    return told


def check(books: Books, told: dict[str, Told]) -> None:
    """A stream costs what was delivered of it, anything else nothing."""
    books.check_idle()
    for name, one in told.items():
        records = books.records.get(name, [])
        if not name.endswith("stream"):
            assert records == [], name
        for record in records:
            assert not record["complete"]
            assert record["output_tokens"] <= one.pieces
    assert set(books.records) <= {*told, "before"}
    (before,) = books.records["before"]
    assert before["complete"]


async def ask_again(
    wires: tuple[Rest, Grpc], process: Process, told: dict[str, Told], vendor: Vendor, first: Books
) -> None:
    """Whoever asks again with the same Idempotency-Key gets an answer, which is charged once."""
    for name in told:
        stream = name.endswith("stream")
        for turn, wire in enumerate(wires):
            repeated = await wire(body(name), f"{name}.again{turn}", stream=stream, repeat_key=name)
            assert repeated.whole, repeated
        assert vendor.asked[name] == 2
    books = await read_books(process)
    books.check_idle()
    for name in told:
        again = [r for turn in (0, 1) for r in books.records.get(f"{name}.again{turn}", ())]
        assert [record["complete"] for record in again] == [True]
        assert books.records.get(name, []) == first.records.get(name, [])


@pytest.fixture
async def house(trouble: Trouble, tmp_path: Path, upstream: FaultUpstream) -> AsyncIterator[House]:
    """A house on that disk."""
    (tmp_path / "disk").mkdir()
    async with await House(tmp_path / "disk", upstream).prepare(CREDITS) as made:
        made.errors = tmp_path / "errors"
        trouble.mount(made)
        yield made


async def test_tasks_that_end_while_the_disk_is_in_trouble_are_settled_when_it_is_well_again(
    trouble: Trouble, house: House, upstream: FaultUpstream, vendor: Vendor
) -> None:
    process = await house.start(errors=subprocess.DEVNULL)
    async with callers(process.rest, process.grpc, house.key) as wires:
        await acknowledged(wires[0], vendor)
        told = await in_trouble(trouble, wires, process, upstream, vendor)
        await trouble.end(process)
        books = await resolved(process)
        check(books, told)
        for name, one in told.items():
            if name.endswith("stream"):
                (record,) = books.records[name]
                assert record["cost"] > 0
                assert record["output_tokens"] == (one.pieces if name.startswith("text") else 0)
        await ask_again(wires, process, told, vendor, books)


async def test_what_a_server_held_that_died_on_a_full_disk_is_free_at_its_next_start(
    trouble: Trouble, house: House, upstream: FaultUpstream, vendor: Vendor
) -> None:
    process = await house.start(errors=subprocess.DEVNULL)
    async with callers(process.rest, process.grpc, house.key) as wires:
        await acknowledged(wires[0], vendor)
        told = await in_trouble(trouble, wires, process, upstream, vendor)
        books = await read_books(process)
        books.check()
        assert len(books.held) == len(told)
        process.kill()
        assert await process.ended() == -signal.SIGKILL
    await trouble.end_without_server(house)
    process = await house.start()
    books = await read_books(process)
    check(books, told)
    async with callers(process.rest, process.grpc, house.key) as wires:
        await ask_again(wires, process, told, vendor, books)


async def test_uploads_to_a_disk_in_trouble_are_unavailable_and_leave_nothing(
    trouble: Trouble, house: House, vendor: Vendor
) -> None:
    process = await house.start(errors=subprocess.DEVNULL, POMELO_DISK_RESERVE="0")
    async with aiohttp.ClientSession() as session, grpc.aio.insecure_channel(process.grpc) as channel:
        await trouble.begin(process)
        for size in (10, 100_000, 3_000_000):
            assert await form(session, process, house, size) == (503, "store_unavailable")
            assert await upload(channel, house, size) == "UNAVAILABLE store_unavailable"
        assert await stored(house) == []
        await trouble.end(process)
        vendor.gate.open()
        assert await upload(channel, house, 100_000) == ""
        assert await form(session, process, house, 100_000) == (200, "")
        assert len(await stored(house)) == 1
    (await read_books(process)).check_idle()


async def test_media_leave_disk_space_for_the_ledger(
    house: House, trouble: Trouble, upstream: FaultUpstream, vendor: Vendor
) -> None:
    if not isinstance(trouble, FullDisk):
        pytest.skip("this one is about a small disk")
    reserve = 6 * 1024 * 1024
    process = await house.start(errors=subprocess.DEVNULL, POMELO_DISK_RESERVE=str(reserve))
    async with (
        aiohttp.ClientSession() as session,
        grpc.aio.insecure_channel(process.grpc) as channel,
        callers(process.rest, process.grpc, house.key) as wires,
    ):
        watch = Watch()
        running = all_kinds(wires, watch, idempotency_key=False)
        for _ in running:
            await upstream.received()
        outcomes = [await upload(channel, house, 1_000_000) for _ in range(16)]
        assert outcomes[0] == ""
        assert outcomes[-1] == "UNAVAILABLE store_unavailable"
        assert await form(session, process, house, 1_000_000) == (503, "store_unavailable")
        assert reserve - 500_000 < await free_of(house) < reserve + 1_000_000
        vendor.gate.open()
        told = {name: await task for name, task in running.items()}
        assert {name: one.code for name, one in told.items() if not one.whole} == {}
        for number in range(200):
            assert (await wires[number % 2](body("text"), f"more-{number}")).whole
    books = await read_books(process)
    books.check_idle()
    assert all(record["complete"] for name in told for record in books.records[name])
    assert {f"more-{number}" for number in range(200)} <= set(books.records)


async def form(session: aiohttp.ClientSession, process: Process, house: House, size: int) -> tuple[int, str]:
    """The status and the error's code of a form with an audio file."""
    data = aiohttp.FormData({"model": "eleven-labs-stt"})
    data.add_field("audio", b"OggS" + bytes(size), filename="a.ogg", content_type="audio/ogg")
    headers = {"Authorization": f"Bearer {house.key}"}
    async with session.post(f"{process.rest}/api/v1/task", data=data, headers=headers) as answer:
        return answer.status, (await answer.json()).get("error", {}).get("code", "")


async def upload(channel: grpc.aio.Channel, house: House, size: int) -> str:
    """The status and the error's reason of an upload; empty when it was stored."""
    pieces = [UploadMediaRequest(content_type="audio/ogg")]
    pieces += [UploadMediaRequest(chunk=bytes(min(250_000, size - at))) for at in range(0, size, 250_000)]
    try:
        await MediaServiceStub(channel).UploadMedia(iter(pieces), metadata=bearer(house.key))
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {reason_of(error)}"
    return ""


async def stored(house: House) -> list[str]:
    """The names of the files in the media folder."""
    return (await inside(house, "ls", "-A", str(house.data / "media"))).split()


async def free_of(house: House) -> int:
    """Bytes that are free on the disk."""
    blocks, size = (await inside(house, "stat", "-f", "-c", "%a %S", str(house.data))).split()
    return int(blocks) * int(size)


async def inside(house: House, *command: str) -> str:
    """The output of a program that is run where the house's files are."""
    process = await asyncio.create_subprocess_exec(*house.inside, *command, stdout=subprocess.PIPE)
    said, _ = await process.communicate()
    assert process.returncode == 0
    return said.decode()


async def acknowledged(wire: Rest, vendor: Vendor) -> None:
    """A task that is whole before the trouble begins."""
    vendor.gate.open()
    assert (await wire(body("before"), "before")).whole
    vendor.gate = Gate()


async def resolved(process: Process) -> Books:
    """The books, once nothing is held any more."""
    async with asyncio.timeout(30):
        while (await read_books(process)).held:
            pass
    return await read_books(process)  # what it held then may have been settled since its records were read
