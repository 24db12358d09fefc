"""Calls are repeated before the first byte, in time, with one idempotency key, and are charged once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from pomelo.app import App
from pomelo.call import Call
from pomelo.client import (
    ApiError,
    IdempotencyConflict,
    IdempotencyMismatch,
    Overloaded,
    RateLimitExceeded,
    ServerUnavailable,
)
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.server import ServerOptions, open_server
from pomelo.service import TaskService
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.app import RunningApp, app_fixture
from tests.client.clients import KINDS, begin, make_client, read
from tests.client.conftest import ClientFactory
from tests.conftest import Keys
from tests.faults.tcp_proxy import Cut, TcpProxy
from tests.ports import free_port
from tests.waiting import until

server = app_fixture()

KIND = pytest.mark.parametrize("kind", KINDS)


class Failing:
    """The tasks of an app whose first attempts fail, as the prompt says: `CODE TIMES`, with `FIRST,CODE` if the first
    has a code of its own; or `lost`: the first answer does not arrive. `keys` has the idempotency key of each attempt."""

    def __init__(self, inner: TaskService) -> None:
        self._inner = inner
        self._failures: Counter[str] = Counter()
        self.keys: dict[str, list[str | None]] = defaultdict(list)

    def _fail(self, spec: TaskSpec, call: Call) -> None:
        prompt = spec.text.messages[0].content[0].text
        self.keys[prompt].append(call.idempotency_key)
        code, times = prompt.split()[:2]
        self._failures[prompt] += 1
        if code != "lost" and self._failures[prompt] <= int(times):
            first, _, later = code.partition(",")
            raise PomeloError(first if self._failures[prompt] == 1 else later or first, retry_after=1)

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        self._fail(spec, call)
        result = await self._inner.run_task(spec, options, call)
        prompt = spec.text.messages[0].content[0].text
        if prompt.startswith("lost") and self._failures[prompt] == 1:
            raise PomeloError("server_unavailable")
        return result

    @asynccontextmanager
    async def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AsyncIterator[AsyncIterator[TaskEvent]]:
        self._fail(spec, call)
        async with self._inner.stream_task(spec, options, call) as events:
            yield events


@asynccontextmanager
async def half_broken(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Yields the address of a proxy, and a function that breaks its first connection at the client's end only."""
    writers: list[asyncio.StreamWriter] = []
    forwarding: set[asyncio.Task[None]] = set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(64 * 1024):
                writer.write(data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*address.split(":"))
        writers.extend((writer, back))
        forwarding.update(asyncio.create_task(forward(*way)) for way in ((reader, back), (there, writer)))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as proxy:
        host, port = proxy.sockets[0].getsockname()
        yield f"{host}:{port}", lambda: writers[0].transport.abort()
        for end in writers:
            end.transport.abort()
        await asyncio.wait(forwarding)


@pytest.fixture
async def failing(app: App) -> AsyncIterator[tuple[str, Failing]]:
    """The address of a server, and its tasks."""
    tasks = Failing(app.services.tasks)
    services = replace(app.services, tasks=tasks)
    options = ServerOptions("127.0.0.1:0")
    async with open_server(services, options, connections=ConnectionObserver()) as opened:
        yield opened.address, tasks


async def test_a_call_is_repeated_after_the_wait_that_the_server_requests(
    connect: ClientFactory, failing: tuple[str, Failing], keys: Keys
) -> None:
    address, tasks = failing
    client = connect(keys.test, address)

    async def check(*, stream: bool) -> None:
        prompt = f"overloaded 2 {stream}"
        began = time.monotonic()
        if stream:
            assert (await read(client.stream("gpt-4", prompt), [])).text
        else:
            assert (await client.text("gpt-4", prompt)).text
        assert time.monotonic() - began >= 2, "the server asked for 1 s each time"
        assert len(tasks.keys[prompt]) == 3
        assert len(set(tasks.keys[prompt])) == 1
        assert tasks.keys[prompt][0]

    await asyncio.gather(check(stream=False), check(stream=True))


async def test_a_call_is_repeated_as_often_as_allowed(
    connect: ClientFactory, failing: tuple[str, Failing], keys: Keys
) -> None:
    address, tasks = failing

    async def check(retries: int, attempts: int, *, of_client: bool) -> None:
        prompt = f"overloaded 9 {retries} {of_client}"
        allowed = {"retries": retries}
        client = connect(keys.test, address, **(allowed if of_client else {}))
        with pytest.raises(Overloaded):
            await client.text("gpt-4", prompt, **({} if of_client else allowed))
        assert len(tasks.keys[prompt]) == attempts

    numbers = ((1, 2), (0, 1))
    await asyncio.gather(
        *(check(*each, of_client=of_client) for each in numbers for of_client in (True, False))
    )
    assert tasks.keys["overloaded 9 0 True"] == [None], "a task that is never repeated has no key"


async def test_an_error_that_no_retry_can_mend_is_raised_immediately(
    connect: ClientFactory, failing: tuple[str, Failing], keys: Keys
) -> None:
    address, tasks = failing
    client = connect(keys.test, address)
    for code in ("provider_failed", "provider_not_configured", "insufficient_credits", "internal_error"):
        with pytest.raises(ApiError) as caught:
            await client.text("gpt-4", f"{code} 1")
        assert caught.value.code == code
        assert len(tasks.keys[f"{code} 1"]) == 1


async def test_a_task_whose_answer_was_lost_is_not_run_again(
    connect: ClientFactory, failing: tuple[str, Failing], keys: Keys
) -> None:
    address, tasks = failing
    result = await connect(keys.test, address).text("gpt-4", "lost answer")
    assert result.replayed
    assert result.cost is not None
    assert result.cost > 0, "that of the first answer"
    assert len(tasks.keys["lost answer"]) == 2
    mine = await connect(keys.test, address).text(
        "gpt-4", "lost answer 2", idempotency_key=f"mine-{time.time_ns()}"
    )
    assert mine.replayed
    assert len(set(tasks.keys["lost answer 2"])) == 1


async def test_the_callers_idempotency_key_finds_the_stored_answer(
    connect: ClientFactory, keys: Keys
) -> None:
    client, key = connect(keys.test), f"mine-{time.time_ns()}"
    first = await client.text("gpt-4", "Once", idempotency_key=key)
    second = await client.text("gpt-4", "Once", idempotency_key=key)
    assert (second.id, second.text, second.replayed) == (first.id, first.text, True)
    with pytest.raises(IdempotencyMismatch):
        await client.text("gpt-4", "Twice", idempotency_key=key)


async def test_a_wait_beyond_the_timeout_is_not_begun(connect: ClientFactory, keys: Keys) -> None:
    client = connect(keys.test, timeout=30)
    with pytest.raises(RateLimitExceeded) as caught:
        await client.text("gpt-4", "[[error:rate_limit_exceeded]]")
    assert caught.value.retry_after == 60


async def test_a_call_waits_for_a_server_that_starts(connect: ClientFactory, app: App, keys: Keys) -> None:
    port = free_port()
    client = connect(keys.test, f"127.0.0.1:{port}", retries=20)
    call = asyncio.ensure_future(client.text("gpt-4", "Hello"))
    await asyncio.sleep(0.2)
    assert not call.done()
    async with open_server(
        app.services, ServerOptions(f"127.0.0.1:{port}"), connections=ConnectionObserver()
    ):
        assert (await call).text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_call_survives_the_restart_of_its_server(
    connect: ClientFactory, app: App, keys: Keys, upstream: FaultUpstream, stream: bool
) -> None:
    gate = Gate()
    prompt = f"restart {time.monotonic_ns()}"
    upstream.when(prompt, Answer("never seen", at={0: gate}))
    options = ServerOptions(f"127.0.0.1:{free_port()}", grace=0.1)
    client = connect(keys.live, options.address, retries=20)
    async with open_server(app.services, options, connections=ConnectionObserver()):
        call = begin(client, prompt, stream=stream)
        await gate.reached.wait()
    upstream.reset()
    upstream.when(prompt, Answer("one two"))
    assert not call.done()
    async with open_server(app.services, options, connections=ConnectionObserver()):
        assert (await call).text == "one two"
    upstream.reset()


@KIND
async def test_a_call_whose_connection_breaks_is_repeated_and_charged_once(
    kind: str, server: RunningApp
) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("never seen", at={0: gate}), Answer("one two three"))
    assert server.server.grpc is not None
    async with TcpProxy(int(server.server.grpc.rpartition(":")[2])) as proxy:
        client = make_client(kind, f"127.0.0.1:{proxy.port}", account.live, retries=5)
        call = asyncio.ensure_future(client.text("gpt-4", "Hello"))
        await gate.reached.wait()
        proxy.cut(Cut.NOW)
        assert (await call).text == "one two three"
        await client.close()
    await server.idle(account, live=True)
    (record,) = await server.records(account)
    assert record.complete
    assert (await server.balance(account, live=True)).spent == record.cost


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_call_waits_for_its_attempt_that_the_server_still_runs(
    connect: ClientFactory, failing: tuple[str, Failing], keys: Keys, upstream: FaultUpstream, stream: bool
) -> None:
    address, tasks = failing
    gate = Gate()
    prompt = f"unnoticed 0 {time.monotonic_ns()}"
    upstream.when(prompt, Answer("one two", at={0: gate}))
    async with half_broken(address) as (target, break_first):
        client = connect(keys.live, target)
        call = begin(client, prompt, stream=stream)
        await gate.reached.wait()
        break_first()
        await until(lambda: call.done() or len(tasks.keys[prompt]) == 4)
        assert not call.done(), "these were more attempts than the client's retries"
        gate.open()
        result = await call
    upstream.reset()
    assert (result.text, result.replayed) == ("one two", True)
    assert len(set(tasks.keys[prompt])) == 1


async def test_a_call_waits_for_its_answer_that_the_store_does_not_have_yet(
    connect: ClientFactory, failing: tuple[str, Failing], keys: Keys
) -> None:
    address, tasks = failing
    prompt = f"store_unavailable,idempotency_conflict 4 {time.monotonic_ns()}"
    assert (await connect(keys.test, address).text("gpt-4", prompt)).text
    assert len(tasks.keys[prompt]) == 5
    with pytest.raises(IdempotencyConflict):
        await connect(keys.test, address).text("gpt-4", f"idempotency_conflict 9 {prompt}")


@pytest.mark.parametrize("code", ["overloaded", "provider_unavailable"])
async def test_a_call_that_the_server_has_ended_waits_for_no_other_with_its_key(
    connect: ClientFactory, failing: tuple[str, Failing], keys: Keys, code: str
) -> None:
    address, tasks = failing
    prompt = f"{code},idempotency_conflict 4 {time.monotonic_ns()}"
    with pytest.raises(IdempotencyConflict):
        await connect(keys.test, address).text("gpt-4", prompt)
    assert len(tasks.keys[prompt]) == 3, "as often as the client's retries allow"


@KIND
async def test_without_an_idempotency_key_a_broken_call_is_not_repeated(
    kind: str, server: RunningApp
) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("never seen", at={0: gate}))
    assert server.server.grpc is not None
    async with TcpProxy(int(server.server.grpc.rpartition(":")[2])) as proxy:
        client = make_client(kind, f"127.0.0.1:{proxy.port}", account.live)
        call = asyncio.ensure_future(client.text("gpt-4", "Hello", idempotency_key=""))
        await gate.reached.wait()
        proxy.cut(Cut.NOW)
        with pytest.raises(ServerUnavailable):
            await call
        await client.close()


@KIND
async def test_a_stream_that_breaks_after_the_first_piece_is_not_repeated(
    kind: str, server: RunningApp
) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("one two three", at={2: gate}))
    before = len(server.upstream.requests)
    assert server.server.grpc is not None
    pieces: list[str] = []
    async with TcpProxy(int(server.server.grpc.rpartition(":")[2])) as proxy:
        client = make_client(kind, f"127.0.0.1:{proxy.port}", account.live)
        reading = asyncio.ensure_future(read(client.stream("gpt-4", "Hello"), pieces))
        await until(lambda: len(pieces) >= 2)
        proxy.cut(Cut.NOW)
        with pytest.raises(ServerUnavailable):
            await reading
        await client.close()
    assert pieces == ["one", " two"]
    await server.idle(account, live=True)
    assert len(server.upstream.requests) == before + 1
    (record,) = await server.records(account)
    assert (record.complete, record.output_tokens) == (False, 2)


async def test_an_upload_is_repeated_if_it_can_be_read_again(
    connect: ClientFactory, app: App, keys: Keys
) -> None:
    port = free_port()
    client = connect(keys.test, f"127.0.0.1:{port}", retries=20)
    call = asyncio.ensure_future(client.upload(b"RIFF" + bytes(2**22)))
    await asyncio.sleep(0.2)
    assert not call.done()
    async with open_server(
        app.services, ServerOptions(f"127.0.0.1:{port}"), connections=ConnectionObserver()
    ):
        assert (await call).size_bytes == 2**22 + 4
