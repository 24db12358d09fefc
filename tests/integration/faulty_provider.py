"""A provider that does what a test says, in place of every vendor of an app."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, TextOutput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event, Job
from pomelo.providers.sandbox import Sandbox
from tests.app import RunningApp, app_fixture
from tests.driver import PROTOCOLS, Outcome
from tests.tasks import text_body

WORD = Event(text_delta=TextDelta(text="Hello"))
LAST = Event(
    completed=TaskResult(
        text=TextOutput(finish_reason=FinishReason.FINISH_REASON_STOP),
        usage=Usage(input_tokens=1, output_tokens=1),
    )
)


class FaultyProvider:
    """A provider whose task methods call `act`."""

    configured = True
    act: Callable[[Job[Any]], Any]

    def __init__(self) -> None:
        self.text = self.image = self.text_to_speech = self.speech_to_text = self._act

    def _act(self, job: Job[Any]) -> Any:
        return self.act(job)

    async def aclose(self) -> None:
        pass


FAULTY = FaultyProvider()


def yielding(*events: Any, then: Callable[[], BaseException] | None = None) -> Callable[[Job[Any]], Any]:
    """Returns a task method that yields the events and then raises."""

    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        for event in events:
            yield event
        if then is not None:
            raise then()

    return act


def faulty_app() -> Any:
    """Returns a fixture of a module: an app with the faulty provider in place of every vendor."""
    return app_fixture(
        providers={"sandbox": Sandbox(), **dict.fromkeys(("openai", "bfl", "elevenlabs"), FAULTY)}
    )


async def ask(app: RunningApp, protocol: str, **options: Any) -> Outcome:
    """Runs a text task of a new account with a live key; `options` go to `RunningApp.ask`."""
    return await app.ask(protocol, (await app.account()).live, text_body(), **options)


async def check(
    app: RunningApp,
    caplog: pytest.LogCaptureFixture,
    body: dict[str, Any],
    *,
    stream: bool,
    logged: bool = True,
) -> None:
    """Asserts that a task over every protocol ends in provider_failed, logs one line, and leaves no reservation."""
    for protocol in PROTOCOLS:
        account = await app.account()
        caplog.clear()
        request_id = f"id-{protocol}"
        async with asyncio.timeout(20):
            outcome = await app.ask(
                protocol, account.live, body, stream=stream, headers={"X-Request-Id": request_id}
            )
        assert (outcome.code, outcome.done) == ("provider_failed", False), (protocol, outcome)
        assert "secret" not in outcome.message
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert len(lines) == logged, (protocol, lines)
        assert all(f"request {request_id}: the provider " in line for line in lines)
        assert "secret" not in caplog.text
        await app.idle(account, live=True)
        assert (await app.balance(account, live=True)).held == 0
        if not stream:
            assert await app.records(account) == []
