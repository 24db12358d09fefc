"""Providers that return a whole answer from a coroutine, and what a plug-in may do there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.engine.routing import Router
from pomelo.engine.upstream_calls import UpstreamCalls
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta
from pomelo.providers import cancellation
from pomelo.providers.base import CALLER, Job, complete_method, is_built_in, one_event
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.guard import GuardedEvents
from pomelo.providers.sandbox import Sandbox
from pomelo.providers.text import completed_text
from pomelo.testing.samples import sample
from tests.unit.engine.routing_rig import MODEL

WHOLE = completed_text("whole", FinishReason.FINISH_REASON_STOP, None)
STREAMED = completed_text("streamed", FinishReason.FINISH_REASON_STOP, None)


class Both:
    """A provider with both methods for text. `act` is what `complete_text` does."""

    configured = True
    act: Callable[[Job[Any]], Any]

    def __init__(self) -> None:
        self.callers: list[str] = []

    async def text(self, job: Job[Any]) -> AsyncGenerator[TaskEvent, None]:
        yield STREAMED

    async def complete_text(self, job: Job[Any]) -> Any:
        self.callers.append(CALLER.get())
        return await self.act(job) if hasattr(self, "act") else WHOLE

    async def aclose(self) -> None:
        pass


def job(*, stream: bool = False) -> Job[Any]:
    return replace(sample("text", Route("acme", "large")), stream=stream)


async def complete(act: Callable[[Job[Any]], Any]) -> TaskEvent:
    """What passes the guard of a plug-in."""
    provider = Both()
    provider.act = act
    return await GuardedEvents(provider.text, "text", job(), "acme").complete(provider.complete_text)


def test_a_subclass_that_replaces_only_the_events_is_called_for_whole_answers_too() -> None:
    class Events(Both):
        async def text(self, job: Job[Any]) -> AsyncGenerator[TaskEvent, None]:
            yield STREAMED

    class Whole(Events):
        async def complete_text(self, job: Job[Any]) -> TaskEvent:
            return WHOLE

    class Dynamic:
        """A plug-in that has any method."""

        configured = True

        def __getattr__(self, name: str) -> Any:
            return Both().text

        async def aclose(self) -> None:
            pass

    replaced = Both()
    replaced.text = Events().text  # type: ignore[method-assign]
    assert complete_method(Both(), "text") is not None
    assert complete_method(Whole(), "text") is not None
    assert complete_method(Events(), "text") is None
    assert complete_method(replaced, "text") is None
    assert complete_method(Dynamic(), "text") is None
    assert complete_method(Both(), "image") is None


async def test_a_whole_answer_is_returned_and_a_stream_yields() -> None:
    provider = Both()
    router = Router({"one": provider})
    candidates = router.candidates(MODEL, "text", live=True)
    whole = replace(job(), route=candidates[0].route)
    assert await router.start(whole, candidates, UpstreamCalls("ann")) == WHOLE
    assert provider.callers == ["ann"]
    events = await router.start(replace(whole, stream=True), candidates, UpstreamCalls())
    assert not isinstance(events, TaskEvent)
    assert [event.completed.text.message.content[0].text async for event in events] == ["streamed"]
    assert [event async for event in one_event(provider.complete_text, whole)] == [WHOLE]


async def test_a_whole_answer_is_retried_and_counted_as_the_events_are() -> None:
    provider = Both()
    errors = [UpstreamError("provider_unavailable", retry=RetryPolicy.SAME_ROUTE)] * 2
    slept: list[float] = []

    async def act(job: Job[Any]) -> TaskEvent:
        if errors:
            raise errors.pop()
        return WHOLE

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    provider.act = act
    router = Router({"one": provider}, sleep=sleep, jitter=lambda: 1.0)
    candidates = router.candidates(MODEL, "text", live=True)
    whole = replace(job(), route=candidates[0].route, deadline=1e12)
    assert await router.start(whole, candidates, UpstreamCalls()) == WHOLE
    assert slept == [0.25, 0.5]


async def returns(event: Any) -> Any:
    return event


async def raises(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("act", "logged"),
    [
        (lambda job: returns(None), "yielded a NoneType instead of an Event"),
        (lambda job: returns(TaskEvent()), "yielded an empty event for a task of type text"),
        (
            lambda job: returns(TaskEvent(text_delta=TextDelta(text="Hi"))),
            "returned an event that is not the last one",
        ),
        (lambda job: returns(completed_text("", 0, None)), "yielded a text without its finish_reason"),  # type: ignore[arg-type]
        (lambda job: raises(SystemExit(3)), "failed unexpectedly"),
        (lambda job: raises(asyncio.CancelledError()), "failed unexpectedly"),
        (lambda job: raises(StopAsyncIteration()), "failed unexpectedly"),
        (lambda job: raises(PomeloError("invalid_api_key")), "raised invalid_api_key"),
    ],
)
async def test_what_a_plug_in_may_not_return_or_raise_is_logged_and_fails_the_task(
    caplog: pytest.LogCaptureFixture, act: Callable[[Job[Any]], Any], logged: str
) -> None:
    with pytest.raises(PomeloError) as raised:
        await complete(act)
    assert raised.value.code == "provider_failed"
    assert f"the provider acme {logged}" in caplog.text


async def test_a_plug_in_that_cancels_its_task_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def act(job: Job[Any]) -> TaskEvent:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return WHOLE

    with pytest.raises(PomeloError) as raised:
        await complete(act)
    assert raised.value.code == "provider_failed"
    assert "cancelled the task that runs it" in caplog.text
    await asyncio.sleep(0)  # this task goes on


async def test_a_plug_in_that_ignores_a_cancellation_is_stopped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancellation, "CLOSE_TIMEOUT", 0.05)
    started = asyncio.Event()

    async def act(job: Job[Any]) -> TaskEvent:
        started.set()
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

    with caplog.at_level(logging.ERROR):
        task = asyncio.create_task(complete(act))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 20)
    assert "went on after it was cancelled" in caplog.text


def test_only_our_own_code_is_trusted() -> None:
    class PlugIn(OpenAI):
        """A plug-in on the base of a built-in provider."""

    sandbox: Any = Sandbox()
    assert is_built_in(sandbox)
    assert is_built_in(OpenAI.__new__(OpenAI))
    assert not is_built_in(PlugIn.__new__(PlugIn))
    assert not is_built_in(Both())
