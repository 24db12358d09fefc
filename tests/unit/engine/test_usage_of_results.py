"""What a task used and cost: the same in its result, in its usage record and in the account's balance."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import from_json

from pomelo.engine.results import write_usage
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.gen.v1.text_pb2 import FINISH_REASON_STOP, TextInput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event, Job
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.stores.usage import UsageRecord
from pomelo.testing import Answer as Words
from tests.calls import call_of
from tests.tasks import small_task, text_task, to_task
from tests.unit.engine.apps import LIVE, PROTOCOL, STREAM, Answer, EngineApp, open_engine

TASK_TYPE = pytest.mark.parametrize(
    "task_type", ["text", "image", "text_to_speech", "speech_to_speech", "speech_to_text"]
)
SPOKEN = "Good morning."


def result_of(answer: Answer) -> TaskResult:
    assert answer.code == "ok"
    last = answer.events[-1]
    result: TaskResult = last if isinstance(last, TaskResult) else last.completed
    return result


def counts_of(record: UsageRecord) -> Usage:
    """The usage that a result has, by a record."""
    names = {field.name for field in fields(record)} & {field.name for field in Usage.DESCRIPTOR.fields}
    counts = {name: getattr(record, name) for name in names}
    return Usage(**counts, audio_seconds=record.audio_ms / 1000)


@TASK_TYPE
@STREAM
@PROTOCOL
@LIVE
async def test_a_result_has_the_usage_and_the_cost_of_its_record(
    engine: EngineApp, task_type: str, stream: bool, protocol: str, live: bool
) -> None:
    account = await engine.account(live=live)
    result = result_of(await engine.ask(account, small_task(task_type), stream=stream, protocol=protocol))
    (record,) = await engine.records(account)
    assert result.usage == counts_of(record)
    assert result.HasField("cost_micros")
    assert result.cost_micros == record.cost == (await engine.balance(account)).spent > 0
    match task_type:
        case "text":
            assert result.usage.input_tokens > 0
            assert result.usage.output_tokens > 0
        case "image":
            assert result.usage == Usage(images=1)
        case "text_to_speech":
            assert result.usage == Usage(characters=len(SPOKEN))
        case _:
            assert result.usage == Usage(audio_seconds=record.audio_ms / 1000)
            assert record.audio_ms > 0


@STREAM
async def test_a_result_has_the_reasoning_and_the_cached_tokens(engine: EngineApp, stream: bool) -> None:
    account = await engine.account()
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 27,
        "total_tokens": 127,
        "prompt_tokens_details": {"cached_tokens": 60},
        "completion_tokens_details": {"reasoning_tokens": 20},
    }
    engine.upstream.when("think", Words("one two", usage=usage))
    result = result_of(await engine.ask(account, text_task("think"), stream=stream))
    assert result.usage == Usage(
        input_tokens=100, output_tokens=27, cached_input_tokens=60, reasoning_tokens=20
    )
    (record,) = await engine.records(account)
    assert (record.reasoning_tokens, record.cached_input_tokens) == (20, 60)
    assert counts_of(record) == result.usage


@STREAM
@pytest.mark.parametrize(
    ("prompt", "completion", "billed"),
    [(100, 7, (100, 7)), (0, 7, (1, 7)), (100, 0, (100, 2)), (0, 0, (1, 2))],
    ids=["plausible", "no input", "no output", "neither"],
)
async def test_a_result_has_the_counts_that_are_billed_in_place_of_impossible_ones(
    engine: EngineApp, stream: bool, prompt: int, completion: int, billed: tuple[int, int]
) -> None:
    account = await engine.account()
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    engine.upstream.when("counted", Words("one two", usage=usage))
    result = result_of(await engine.ask(account, text_task("counted"), stream=stream))
    assert (result.usage.input_tokens, result.usage.output_tokens) == billed
    assert result.cost_micros == billed[0] * 4 + billed[1] * 20
    (record,) = await engine.records(account)
    assert (record.input_tokens, record.output_tokens) == billed
    assert record.source == ("provider" if billed == (prompt, completion) else "estimated")


def test_every_count_of_a_record_is_in_its_result() -> None:
    counts: dict[str, Any] = {
        "input_tokens": 90,
        "output_tokens": 80,
        "cached_input_tokens": 30,
        "cache_write_input_tokens": 20,
        "cache_write_1h_input_tokens": 10,
        "reasoning_tokens": 40,
        "characters": 50,
        "images": 60,
    }
    record = UsageRecord(
        "task_1", "req_1", "ann", True, "k", "rest", "gpt-4", "text", audio_ms=1_501, cost=70, **counts
    )
    result = TaskResult()
    write_usage(result, record)
    assert result.usage == Usage(**counts, audio_seconds=1.501)
    assert {field.name for field, _ in result.usage.ListFields()} == {
        field.name for field in Usage.DESCRIPTOR.fields
    }
    assert result.cost_micros == 70


def test_a_result_that_used_and_cost_nothing_says_so() -> None:
    result = TaskResult()
    write_usage(result, UsageRecord("task_1", "req_1", "ann", True, "k", "rest", "gpt-4", "text"))
    assert result.HasField("usage")
    assert result.HasField("cost_micros")
    assert (result.usage, result.cost_micros) == (Usage(), 0)


# --- user and metadata


@TASK_TYPE
@STREAM
@PROTOCOL
async def test_a_record_has_the_user_and_the_metadata_of_its_task(
    engine: EngineApp, task_type: str, stream: bool, protocol: str
) -> None:
    account = await engine.account()
    spec = small_task(task_type)
    spec.user = "end\0user"
    spec.metadata.update({"team": "größe", "a": '"\n', "order": ""})
    assert (await engine.ask(account, spec, stream=stream, protocol=protocol)).code == "ok"
    (record,) = await engine.records(account)
    assert record.user == "end\ufffduser"
    assert record.metadata == '{"a":"\\"\\n","order":"","team":"größe"}'
    assert from_json(record.metadata) == dict(spec.metadata)


@STREAM
async def test_a_record_of_a_task_without_labels_has_none(engine: EngineApp, stream: bool) -> None:
    account = await engine.account()
    assert (await engine.ask(account, text_task(), stream=stream)).code == "ok"
    (record,) = await engine.records(account)
    assert (record.user, record.metadata) == ("", "")


async def test_the_record_of_a_stream_that_ends_early_has_the_user_and_the_metadata(
    engine: EngineApp,
) -> None:
    account = await engine.account(live=False)
    spec = text_task("[[words:50]] [[cut]]")
    spec.user, spec.metadata["team"] = "ann", "red"
    assert (await engine.ask(account, spec, stream=True)).code == "provider_failed"
    (record,) = await engine.records(account)
    assert (record.complete, record.user, record.metadata) == (False, "ann", '{"team":"red"}')


@TASK_TYPE
@STREAM
@PROTOCOL
@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"user": "x" * 257}, "user"),
        ({"metadata": {f"key {number}": "" for number in range(17)}}, "metadata"),
        ({"metadata": {"key": "a\0"}}, "metadata.key"),
    ],
)
async def test_a_task_with_wrong_labels_is_refused(
    engine: EngineApp, task_type: str, stream: bool, protocol: str, labels: dict[str, Any], field: str
) -> None:
    account = await engine.account("limited")
    spec = small_task(task_type)
    spec.MergeFrom(TaskSpec(**labels))
    answer = await engine.ask(account, spec, stream=stream, protocol=protocol)
    assert answer.error is not None
    assert (answer.code, answer.error.field) == ("invalid_parameter", field)
    assert (await engine.used(account)).requests == 0


# --- streams that end early


class Reporting:
    """A provider of texts that reports an early count of the input in each of its calls, and then yields a word
    and raises an error."""

    configured = True

    def __init__(self, *calls: tuple[Usage | None, str, Exception | None]) -> None:
        self._calls = iter(calls)

    async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        early, word, error = next(self._calls)
        job.report.usage = early or job.report.usage
        if word:
            event = Event()
            event.text_delta.text = word
            yield event
        if error is not None:
            raise error
        last = Event()
        last.completed.text.finish_reason = FINISH_REASON_STOP
        yield last

    async def aclose(self) -> None:
        pass


FAILED = PomeloError("provider_failed")
AGAIN = UpstreamError("provider_unavailable", retry=RetryPolicy.SAME_ROUTE)
ELSEWHERE = UpstreamError("provider_unavailable", retry=RetryPolicy.NEXT_ROUTE)
EARLY = Usage(input_tokens=77, cached_input_tokens=50, output_tokens=5, reasoning_tokens=3)
OTHER = Usage(input_tokens=500)
OWN_COUNT = 2
"""Pomelo's count of the words of the prompt."""


def mixtral() -> TaskSpec:
    return to_task({"model": "mixtral-8x7b", "messages": [{"role": "user", "content": "Hello, world"}]})


@pytest.mark.parametrize(
    ("calls", "counts"),
    [
        ([(EARLY, "one", FAILED)], (77, 50, 1, 0)),
        ([(EARLY, "one", None)], (77, 50, 1, 0)),
        ([(None, "one", FAILED)], (OWN_COUNT, 0, 1, 0)),
        ([(Usage(input_tokens=2**40), "one", FAILED)], (OWN_COUNT, 0, 1, 0)),
        ([(Usage(input_tokens=7, cached_input_tokens=8), "one", FAILED)], (OWN_COUNT, 0, 1, 0)),
        ([(OTHER, "", AGAIN), (None, "one", FAILED)], (OWN_COUNT, 0, 1, 0)),
        ([(OTHER, "", AGAIN), (EARLY, "one", FAILED)], (77, 50, 1, 0)),
    ],
    ids=[
        "cut",
        "without counts at the end",
        "no report",
        "too large",
        "impossible",
        "forgotten",
        "the last one",
    ],
)
async def test_an_early_count_of_the_input_is_billed_when_the_stream_has_no_other(
    tmp_path: Path, calls: list[tuple[Usage | None, str, Exception | None]], counts: tuple[int, ...]
) -> None:
    async with open_engine(tmp_path, {"openai": Reporting(*calls)}) as engine:
        account = await engine.account()
        answer = await engine.ask(account, text_task("Hello, world"), stream=True)
        assert answer.code == ("ok" if calls[-1][2] is None else "provider_failed")
        (record,) = await engine.records(account)
        assert (
            record.input_tokens,
            record.cached_input_tokens,
            record.output_tokens,
            record.reasoning_tokens,
        ) == counts
        assert (record.source, record.complete) == ("estimated", answer.code == "ok")
        assert record.cost == (await engine.balance(account)).spent > 0
        if answer.code == "ok":
            assert result_of(answer).usage == counts_of(record)


@pytest.mark.parametrize(("second", "billed"), [(None, OWN_COUNT), (EARLY, 77)], ids=["none", "its own"])
async def test_a_route_that_takes_over_is_not_billed_by_the_count_of_the_first(
    tmp_path: Path, second: Usage | None, billed: int
) -> None:
    providers = {
        "mistral": Reporting((OTHER, "", ELSEWHERE)),
        "openrouter": Reporting((second, "one", FAILED)),
    }
    async with open_engine(tmp_path, providers) as engine:
        account = await engine.account()
        answer = await engine.ask(account, mixtral(), stream=True)
        assert (answer.code, answer.text) == ("provider_failed", "one")
        (record,) = await engine.records(account)
        assert (record.provider, record.input_tokens) == ("openrouter", billed)


async def test_a_stream_that_its_caller_leaves_is_billed_by_the_early_count(tmp_path: Path) -> None:
    async with open_engine(tmp_path, {"openai": Reporting((EARLY, "one", None))}) as engine:
        account = await engine.account()
        spec, options = text_task("Hello, world"), TaskOptions()
        async with engine.app.services.tasks.stream_task(spec, options, call_of(account.key)) as events:
            async for event in events:
                if event.HasField("text_delta"):
                    break
        await engine.settled(account)
        (record,) = await engine.records(account)
        assert (record.input_tokens, record.output_tokens, record.complete) == (77, 1, False)
