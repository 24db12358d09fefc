"""The services over a channel behave like the services of the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pomelo.app import App
from pomelo.call import Call
from pomelo.configuration.front_ends import gateway_proof
from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.network.origin import GatewayProof
from pomelo.providers.sandbox.triggers import ERRORS
from pomelo.runtime.in_flight import MIB
from pomelo.server.remote import open_remote
from pomelo.server.remote.channel import Connection, open_channel
from pomelo.server.remote.watch import ServerWatch
from pomelo.server.server import ServerOptions, open_server
from pomelo.service import Services, TaskService, list_all_models
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.calls import call_of, error_parts, refusal
from tests.conftest import Keys
from tests.integration.both_ends import both_ends
from tests.integration.scripted_services import PROOF
from tests.tasks import TASK_TYPES, output_field, small_task, text_task
from tests.waiting import cancel, soon

ADJUSTED = {"image": "width=256; height=256"}
"""The fields of the tasks of `small_task` that live models adjust."""


async def run_task(services: Services, spec: TaskSpec, call: Call) -> TaskResult:
    return await services.tasks.run_task(spec, TaskOptions(), call)


async def events_of(services: Services, spec: TaskSpec, call: Call) -> list[TaskEvent]:
    async with services.tasks.stream_task(spec, TaskOptions(), call) as events:
        return [event async for event in events]


Run = Callable[[Services, TaskSpec, Call], Coroutine[Any, Any, Any]]
RUN = pytest.mark.parametrize("run", [run_task, events_of])


# --- the same results as the local services


def assert_headers(call: Call, kind: str) -> None:
    """Asserts that a call has all headers of a task of `small_task`, and no others."""
    assert call.response_headers.pop("X-Credits-Remaining")
    call.response_headers.pop("X-Credits-Charged", None)
    assert call.response_headers.pop("X-Pomelo-Adjusted", "") == ADJUSTED.get(kind, "")
    assert call.response_headers == {"X-Request-Id": "mine", "X-Pomelo-Mode": "test"}


async def test_a_replay_is_refused_while_its_caller_has_too_much_to_read(
    remote: Services, keys: Keys
) -> None:
    spec, call = small_task("text_to_speech"), call_of(keys.test, idempotency_key="unread")
    first = await run_task(remote, spec, call_of(keys.test, idempotency_key="unread"))
    visit = await remote.access.admit(call)
    read = visit.hold(300 * MIB)
    for run in (run_task, events_of):
        assert (await refusal(run(remote, spec, call))).code == "overloaded"
        replayed = {"Idempotent-Replayed", "X-Credits-Charged", "X-Pomelo-Adjusted"}
        assert not replayed & call.response_headers.keys()
    read()
    assert (await events_of(remote, spec, call))[-1].completed.id == first.id
    assert (await run_task(remote, spec, call)).speech.data == first.speech.data
    assert call.response_headers["Idempotent-Replayed"] == "true"
    visit.close()


@pytest.mark.parametrize("kind", TASK_TYPES)
async def test_a_task_of_each_type_runs_and_fills_the_response_headers(
    kind: str, remote: Services, keys: Keys
) -> None:
    call = call_of(keys.test, x_request_id="mine")
    result = await remote.tasks.run_task(small_task(kind), TaskOptions(), call)
    assert result.WhichOneof("output") == output_field(kind)
    assert_headers(call, kind)


@pytest.mark.parametrize("kind", TASK_TYPES)
async def test_a_stream_of_each_type_has_all_headers_before_the_first_event(
    kind: str, remote: Services, app: App, keys: Keys
) -> None:
    call = call_of(keys.test, x_request_id="mine")
    async with remote.tasks.stream_task(small_task(kind), TaskOptions(), call) as events:
        assert_headers(call, kind)
        remote_events = [event.WhichOneof("event") async for event in events]
    local_events = await events_of(app.services, small_task(kind), call_of(keys.test))
    assert remote_events == [event.WhichOneof("event") for event in local_events]


@pytest.mark.parametrize("code", sorted(ERRORS))
@RUN
async def test_an_error_equals_that_of_the_local_services(
    code: str, run: Run, remote: Services, app: App, keys: Keys
) -> None:
    for _ in range(3):  # limits and credits in the headers may change between the two calls, but rarely do
        errors, headers = [], []
        for services in (app.services, remote):
            task, call = text_task(f"[[error:{code}]]"), call_of(keys.test, x_request_id="mine")
            errors.append(await refusal(run(services, task, call)))
            headers.append(call.response_headers)
        if headers[0] == headers[1]:
            break
    assert errors[0].code == code
    assert error_parts(errors[0])[2:4] == error_parts(errors[1])[2:4]
    if code != "rate_limit_exceeded":  # its message and its values contain the time
        assert error_parts(errors[0]) == error_parts(errors[1])
    assert headers[0] == headers[1]


async def test_a_refused_stream_is_never_entered(remote: Services, app: App, keys: Keys) -> None:
    for services in (app.services, remote):
        with pytest.raises(PomeloError, match="quantum"):
            async with services.tasks.stream_task(
                text_task("Hi", "quantum"), TaskOptions(), call_of(keys.test)
            ):
                pytest.fail("It was entered.")


# --- forwarded calls


@dataclass
class RecordedCalls:
    """Forwards tasks and records their calls."""

    inner: TaskService
    calls: list[Call] = field(default_factory=list)

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        self.calls.append(call)
        return await self.inner.run_task(spec, options, call)

    def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AbstractAsyncContextManager[AsyncIterator[TaskEvent]]:
        self.calls.append(call)
        return self.inner.stream_task(spec, options, call)


async def test_the_server_sees_the_call_as_the_gateway_does(app: App, keys: Keys) -> None:
    recorded = RecordedCalls(app.services.tasks)
    services = replace(app.services, tasks=recorded)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    proof = gateway_proof(b"a secret of both")
    async with both_ends(services, proof=proof) as (_, remote):
        for protocol in ("rest", "grpc"):
            call = call_of(keys.test, 7.0, x_request_id="mine", traceparent=trace)
            call.protocol, call.address = protocol, "203.0.113.9"
            await remote.tasks.run_task(text_task(), TaskOptions(), call)
            await events_of(remote, text_task(), call)
            for seen in recorded.calls:
                assert (seen.api_key, seen.request_id, seen.protocol) == (keys.test, "mine", protocol)
                assert seen.address == "203.0.113.9"
                assert seen.traceparent == trace
                assert seen.header_error is None
                assert abs(seen.deadline - call.deadline) < 0.5
            recorded.calls.clear()
        call = call_of(keys.test, traceparent="with\udcff bytes")
        await remote.tasks.run_task(text_task(), TaskOptions(), call)
        assert recorded.calls[0].traceparent is None


# --- callers who leave


@pytest.mark.parametrize("method", ["run", "stream"])
async def test_leaving_closes_the_provider_s_connection_within_50_ms(
    method: str, remote: Services, keys: Keys, upstream: FaultUpstream
) -> None:
    loop = asyncio.get_running_loop()

    async def leave(number: int) -> float:
        gate = Gate()
        prompt = f"leave {method} through a gateway {number}"
        upstream.when(prompt, Answer("one two three four", at={2: gate}))
        if method == "run":
            running = asyncio.ensure_future(
                remote.tasks.run_task(text_task(prompt), TaskOptions(), call_of(keys.live))
            )
            await gate.reached.wait()
            left = loop.time()
            await cancel(running)
        else:
            async with remote.tasks.stream_task(
                text_task(prompt), TaskOptions(), call_of(keys.live)
            ) as events:
                assert (await anext(events)).WhichOneof("event") == "started"
                await gate.reached.wait()
                left = loop.time()
        received = next(r for r in upstream.requests if r.prompt == prompt)
        await received.left.wait()
        assert received.left_at is not None
        return received.left_at - left

    async with asyncio.timeout(30):
        await soon(leave, 0.05)


@RUN
@pytest.mark.usefixtures("no_garbage_collection")
async def test_cancelled_tasks_leak_no_stream_of_the_connection(
    run: Run, app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    prompt = f"cancelled again and again {run.__name__}"
    upstream.when(prompt, Answer("one two", before=(gate,)))
    async with both_ends(app.services, connection_streams=5) as (_, remote):
        for count in range(1, 16):
            running = asyncio.ensure_future(run(remote, text_task(prompt), call_of(keys.live)))
            await upstream_has(upstream, prompt, count)
            await cancel(running)
        assert await remote.tasks.run_task(text_task(), TaskOptions(), call_of(keys.test))


async def test_more_streams_than_one_connection_takes_run_concurrently(app: App, keys: Keys) -> None:
    # A gateway puts 200 streams on a connection.
    async with both_ends(app.services, connection_streams=210) as (_, remote), AsyncExitStack() as stack:
        for _ in range(230):
            stream = remote.tasks.stream_task(text_task("[[stall]]"), TaskOptions(), call_of(keys.test))
            await stack.enter_async_context(stream)


# --- deadlines


@RUN
async def test_a_deadline_is_reported_by_the_server_with_all_headers(
    run: Run, remote: Services, keys: Keys
) -> None:
    call = call_of(keys.test, 0.3)
    error = await refusal(run(remote, text_task("[[delay:30]]"), call))
    assert error_parts(error) == error_parts(PomeloError("deadline_exceeded"))
    assert time.monotonic() - call.deadline < 5
    assert call.response_headers["X-Pomelo-Mode"] == "test"


async def test_a_deadline_bounds_a_body_that_does_not_read(remote: Services, keys: Keys) -> None:
    call = call_of(keys.test, 0.3)
    async with asyncio.timeout(20):
        with pytest.raises(PomeloError) as caught:
            async with remote.tasks.stream_task(text_task("[[words:5]]"), TaskOptions(), call):
                await asyncio.Event().wait()
    assert caught.value.code == "deadline_exceeded"
    assert caught.value.message == TABLE["deadline_exceeded"].message


@RUN
async def test_a_deadline_that_has_passed_is_reported_immediately(
    run: Run, remote: Services, keys: Keys
) -> None:
    error = await refusal(run(remote, text_task("[[delay:30]]"), call_of(keys.test, -1.0)))
    assert error.code == "deadline_exceeded"


@pytest.mark.parametrize(("proof", "grace"), [(PROOF, 5.25), (GatewayProof(), 0.25)], ids=["proven", "not"])
async def test_calls_for_one_request_share_the_time_after_its_deadline(
    proof: GatewayProof, grace: float
) -> None:
    """Else the report that a request was refused, after a call that the server has not answered, doubled it."""
    async with open_channel("127.0.0.1:1") as unused:
        connection = Connection(unused, proof, ServerWatch("127.0.0.1:1"))
        for since in (-10.0, 0.0, 4.0, 60.0):
            timeout = connection.arguments(call_of("any", -since))["timeout"]
            assert timeout == pytest.approx(max(grace - since, 0.25), abs=0.1)


# --- an unavailable server


async def test_an_unavailable_server_is_reported_as_such() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"x"

    async def download(remote: Services, call: Call) -> None:
        async with remote.media.download_media("media_x", "", call):
            pytest.fail("It was opened.")

    async with open_remote("127.0.0.1:1") as remote:
        expected = error_parts(PomeloError("server_unavailable"))
        assert TABLE["server_unavailable"].http == 503
        for call in (
            run_task(remote, text_task(), call_of("any")),
            events_of(remote, text_task(), call_of("any")),
            list_all_models(remote.models, call_of("any")),
            remote.media.upload_media("", chunks(), call_of("any")),
            download(remote, call_of("any")),
        ):
            assert error_parts(await refusal(call)) == expected


async def test_a_restarted_server_is_reconnected(app: App, keys: Keys) -> None:
    async with open_server(app.services, ServerOptions("127.0.0.1:0")) as server:
        address = server.address
        opened = open_remote(address)
        remote = await opened.__aenter__()
        assert await list_all_models(remote.models, call_of(keys.test))
    assert (await refusal(list_all_models(remote.models, call_of(keys.test)))).code == "server_unavailable"
    async with asyncio.timeout(20), open_server(app.services, ServerOptions(address)):
        while True:
            try:
                assert await list_all_models(remote.models, call_of(keys.test))
            except PomeloError:
                continue
            break
        await opened.__aexit__(None, None, None)


async def test_a_server_that_stops_and_returns_is_logged_once_each_time(
    app: App, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pomelo.gateway")

    def lines() -> list[tuple[str, str]]:
        return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "pomelo.gateway"]

    async with open_server(app.services, ServerOptions("127.0.0.1:0")) as server:
        address = server.address
    async with open_remote(address) as remote:
        for _ in range(3):
            assert (
                await refusal(list_all_models(remote.models, call_of(keys.test)))
            ).code == "server_unavailable"
            assert (await refusal(events_of(remote, text_task(), call_of(keys.test)))).code
        (lost,) = lines()
        assert lost[0] == "WARNING"
        assert f"The server at {address} is lost: it refuses connections" in lost[1]
        async with asyncio.timeout(20), open_server(app.services, ServerOptions(address)):
            while len(lines()) < 2:
                with suppress(PomeloError):
                    await list_all_models(remote.models, call_of(keys.test))
                await asyncio.sleep(0.01)
        assert lines()[1][0] == "INFO"
        assert f"The server at {address} is back after " in lines()[1][1]
        assert keys.test not in caplog.text


async def test_a_stream_of_a_dying_server_never_looks_complete(
    app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    upstream.when("dies under a stream", Answer("one two", at={1: gate}))
    async with asyncio.timeout(20):
        opened = open_server(app.services, ServerOptions("127.0.0.1:0", grace=0))
        server = await opened.__aenter__()
        async with open_remote(server.address) as remote:
            task = text_task("dies under a stream")
            async with remote.tasks.stream_task(task, TaskOptions(), call_of(keys.live)) as events:
                assert (await anext(events)).WhichOneof("event") == "started"
                assert (await anext(events)).text_delta.text == "one"
                await opened.__aexit__(None, None, None)
                assert (await refusal(anext(events))).code == "server_unavailable"


async def test_a_channel_that_is_closed_during_a_call_is_an_error_and_not_a_cancellation(
    app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    upstream.when("closed under a call", Answer("one two", at={1: gate}))
    assert app.grpc is not None
    async with asyncio.timeout(20):
        async with open_remote(app.grpc) as remote:
            task = text_task("closed under a call")
            run = asyncio.ensure_future(remote.tasks.run_task(task, TaskOptions(), call_of(keys.live)))
            read = asyncio.ensure_future(events_of(remote, task, call_of(keys.live)))
            await upstream_has(upstream, "closed under a call", 2)
        assert (await refusal(run)).code == "shutting_down"
        assert (await refusal(read)).code == "shutting_down"


async def upstream_has(upstream: FaultUpstream, prompt: str, count: int) -> None:
    """Returns when the upstream has received `count` requests with a prompt."""
    while sum(r.prompt == prompt for r in upstream.requests) < count:
        await upstream.received()


async def test_the_services_work_over_a_unix_socket(app: App, keys: Keys, folder: Path) -> None:
    async with both_ends(app.services, f"unix:{folder}/s") as (_, remote):
        result = await remote.tasks.run_task(text_task(), TaskOptions(), call_of(keys.test))
        assert result.text.message.content[0].text
