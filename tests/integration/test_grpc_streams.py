"""Streams of events over gRPC: their numbers, their end, its usage and cost; and the same streams over REST."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.gen.v1.speech_pb2 import TextToSpeechInput
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import Role
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event, Job
from pomelo.stores.usage import UsageRecord
from tests.app import Account, RunningApp
from tests.calls import as_dict, bearer
from tests.driver import REST_PROTOCOL, STREAM
from tests.integration.faulty_provider import FAULTY, LAST, WORD, faulty_app, yielding
from tests.tasks import EVENTS_BETWEEN, TASK_TYPES, output_field, small_task, text_body, text_task
from tests.waiting import until

TASK_TYPE = pytest.mark.parametrize("task_type", TASK_TYPES)

_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]

app = faulty_app()


@pytest.fixture
async def account(app: RunningApp) -> Account:
    return await app.account()


async def read_stream(
    app: RunningApp, key: str, spec: TaskSpec
) -> tuple[list[TaskEvent], dict[str, str], str]:
    """Streams a task; returns its events, its trailing metadata and its status."""
    events, status = [], "OK"
    call: Any = TaskServiceStub(app.channel).StreamTask(StreamTaskRequest(spec=spec), metadata=bearer(key))
    try:
        async for response in call:
            events.append(response.event)
    except grpc.aio.AioRpcError as error:
        status = error.code().name
    return events, as_dict(await call.trailing_metadata()), status


async def run(app: RunningApp, key: str, spec: TaskSpec) -> tuple[TaskResult, dict[str, str]]:
    """Runs a task; returns its result and its trailing metadata."""
    call: Any = TaskServiceStub(app.channel).RunTask(RunTaskRequest(spec=spec), metadata=bearer(key))
    return (await call).result, as_dict(await call.trailing_metadata())


def names_of(events: list[TaskEvent]) -> list[str | None]:
    """Returns the types of the events, and asserts that their numbers have no gaps."""
    assert [event.sequence_number for event in events] == list(range(1, len(events) + 1))
    return [event.WhichOneof("event") for event in events]


def text_of(events: list[TaskEvent]) -> str:
    return "".join(event.text_delta.text for event in events)


def ending_with(text: str) -> Event:
    """Returns the last event of a provider, with text that no delta had."""
    last = Event()
    last.CopyFrom(LAST)
    last.completed.text.message.role = Role.ROLE_ASSISTANT
    last.completed.text.message.content.add(text=text)
    return last


async def test_streams_that_are_left_while_they_begin_leave_nothing_in_grpc(
    app: RunningApp, account: Account
) -> None:
    calls: list[Any] = []
    finished = asyncio.Event()

    async def act(job: Job[Any]) -> AsyncIterator[Event]:
        # Initial metadata are sent with the first event: the caller leaves while grpc sends them.
        calls[-1].cancel()
        try:
            await asyncio.sleep(len(calls) % 20 / 20_000)
            yield WORD
            await asyncio.sleep(10)
        finally:
            finished.set()

    def batches() -> int:
        gc.collect()
        return sum(type(one).__name__ == "SendStatusFromServerOperation" for one in gc.get_objects())

    FAULTY.act = act
    before = batches()
    async with asyncio.timeout(30):
        for _ in range(20):
            # A connection with many more is closed as a flood.
            async with grpc.aio.insecure_channel(app.server.grpc or "", options=_OWN_CONNECTION) as channel:
                for _ in range(15):
                    finished.clear()
                    request = StreamTaskRequest(spec=text_task("Hi"))
                    call = TaskServiceStub(channel).StreamTask(request, metadata=bearer(account.live))
                    calls.append(call)
                    await finished.wait()
    await until(lambda: batches() <= before)


# --- the events


@TASK_TYPE
async def test_the_events_of_every_task_type_are_numbered_and_completed_is_last(
    app: RunningApp, account: Account, task_type: str
) -> None:
    events, _, status = await read_stream(app, account.test, small_task(task_type))
    first, *middle, last = names_of(events)
    assert (first, last, status) == ("started", "completed", "OK")
    assert set(middle) == EVENTS_BETWEEN[task_type]
    started, completed = events[0].started, events[-1].completed
    assert (started.id, started.model, started.create_time) == (
        completed.id,
        completed.model,
        completed.create_time,
    )
    assert completed.WhichOneof("output") == output_field(task_type)
    assert not completed.speech.data, "the chunks have it"
    if task_type == "text":
        assert completed.text.finish_reason
        assert min(completed.usage.input_tokens, completed.usage.output_tokens) > 0


@pytest.mark.parametrize("prompt", ["Hello", "[[words:1]]", "[[words:300]]", "[[words:50]] ab c\n"])
@pytest.mark.parametrize("max_tokens", [None, 1, 20])
async def test_the_deltas_joined_are_the_whole_text(
    app: RunningApp, account: Account, prompt: str, max_tokens: int | None
) -> None:
    spec = text_task(prompt)
    if max_tokens is not None:
        spec.text.max_tokens = max_tokens
    events, _, _ = await read_stream(app, account.test, spec)
    whole, _ = await run(app, account.test, spec)
    last = events[-1].completed
    assert text_of(events) == whole.text.message.content[0].text != ""
    assert not last.text.HasField("message")
    assert (last.text.finish_reason, last.usage) == (whole.text.finish_reason, whole.usage)


@pytest.mark.parametrize(
    ("begin", "rest", "deltas"),
    [((WORD,), " there", 2), ((), "Hello there", 1), ((WORD,), "x" * 20_000, 4)],
    ids=["the last word", "the whole text", "a long text"],
)
async def test_text_that_comes_with_the_end_of_a_provider_s_stream_is_a_delta(
    app: RunningApp, account: Account, begin: tuple[Event, ...], rest: str, deltas: int
) -> None:
    FAULTY.act = yielding(*begin, ending_with(rest))
    events, _, _ = await read_stream(app, account.live, text_task())
    assert names_of(events) == ["started", *["text_delta"] * deltas, "completed"]
    assert text_of(events) == "Hello" * len(begin) + rest
    assert not events[-1].completed.text.HasField("message")


async def test_a_text_without_a_word_has_no_delta(app: RunningApp, account: Account) -> None:
    FAULTY.act = yielding(LAST)
    events, _, _ = await read_stream(app, account.live, text_task())
    assert names_of(events) == ["started", "completed"]


@pytest.mark.parametrize(
    "spec",
    [
        text_task("[[words:20]] [[cut]]"),
        TaskSpec(
            model="eleven-labs-tts",
            text_to_speech=TextToSpeechInput(text="[[cut]] Hello there", voice="adam"),
        ),
        TaskSpec(model="flux-1-pro", image=ImageInput(prompt="A kite [[cut]]", width=256, height=256)),
    ],
    ids=["text", "speech", "image"],
)
async def test_a_stream_that_is_cut_has_no_completed(
    app: RunningApp, account: Account, spec: TaskSpec
) -> None:
    events, trailers, status = await read_stream(app, account.test, spec)
    names = names_of(events)
    assert (status, names[0], len(names) > 1) == ("UNAVAILABLE", "started", True)
    assert "completed" not in names
    await app.idle(account)
    balance = await app.balance(account)
    charged = sum(record.cost for record in await app.records(account))
    assert balance.spent == charged
    assert round(float(trailers["x-credits-charged"]) * 10**6) == charged


# --- usage and cost


def counts_of(record: UsageRecord) -> Usage:
    """Returns the counts of a record as a result has them."""
    return Usage(
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        characters=record.characters,
        images=record.images,
        audio_seconds=record.audio_ms / 1000,
    )


@STREAM
@TASK_TYPE
async def test_a_result_has_the_usage_and_the_cost_of_its_record(
    app: RunningApp, account: Account, task_type: str, stream: bool
) -> None:
    if stream:
        events, trailers, _ = await read_stream(app, account.test, small_task(task_type))
        result = events[-1].completed
    else:
        result, trailers = await run(app, account.test, small_task(task_type))
    (record,) = await app.records(account)
    assert record.task_id == result.id
    assert result.usage == counts_of(record) != Usage()
    assert result.cost_micros == record.cost == (await app.balance(account)).spent > 0
    assert round(float(trailers["x-credits-charged"]) * 10**6) == record.cost


# --- the same stream over REST


@pytest.mark.parametrize(
    "events",
    [
        (WORD, ending_with(" there")),
        (ending_with("Hello there"),),
        (WORD, ending_with("\u2028é" * 10_000)),
        (WORD, LAST),
        (LAST,),
    ],
    ids=["the last word", "the whole text", "a long text", "deltas", "no text"],
)
async def test_a_remote_gateway_streams_the_same_bytes_as_a_local_one(
    app: RunningApp, account: Account, events: tuple[Event, ...]
) -> None:
    streams = []
    for protocol in ("rest", "remote"):
        FAULTY.act = yielding(*events)
        lines = await app.lines(protocol, account.live, text_body())
        assert lines[-2:] == [b"data: [DONE]\n", b"\n"]
        assert max(map(len, lines)) < 64 * 1024
        streams.append(re.sub(rb'"id":"task_\w+"|"created":\d+', b"", b"".join(lines)))
    assert streams[0] == streams[1]


@REST_PROTOCOL
async def test_rest_says_the_end_of_a_text_and_then_its_finish_reason(
    app: RunningApp, account: Account, protocol: str
) -> None:
    FAULTY.act = yielding(WORD, ending_with(" there"))
    outcome = await app.ask(protocol, account.live, text_body(), stream=True)
    assert (outcome.code, outcome.content, outcome.done) == ("ok", "Hello there", True)
    assert (outcome.output["finish"], outcome.usage[:2]) == ("stop", (1, 1))
