"""Large texts: what takes long is done in threads, so that other tasks don't wait for it, and in few of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pomelo.engine.acceptance import Acceptance
from pomelo.engine.routing import Router
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.media.duration import Measurer
from pomelo.media.store import MediaStore
from pomelo.tasks.base import LARGE
from pomelo.testing import Answer as Words
from tests.tasks import text_task
from tests.unit.engine.apps import STREAM, open_engine
from tests.unit.engine.test_acceptance import PRINCIPAL, Access, call

WORDS = LARGE // 2
PROMPT = "a " * (WORDS + 1)


class RecordingThreads(ThreadPoolExecutor):
    """The threads of an event loop; `functions` are the names of the functions that it runs in them."""

    def __init__(self) -> None:
        super().__init__(4)
        self.functions: list[str] = []

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        # asyncio.to_thread submits a partial of the context's `run`, whose first argument is the function.
        function = work.args[0] if getattr(work, "args", ()) else work
        self.functions.append(getattr(function, "__name__", ""))
        return super().submit(work, *args, **kwargs)


def run(test: Callable[[RecordingThreads], Awaitable[None]]) -> None:
    """Runs a test in an event loop with threads of its own."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        threads = RecordingThreads()
        runner.get_loop().set_default_executor(threads)

        async def main() -> None:
            await test(threads)

        runner.run(main())


@STREAM
@pytest.mark.parametrize(
    ("prompt", "key", "threads_used"),
    [(PROMPT[: LARGE // 2], "order-7", 0), (PROMPT, None, 2), (PROMPT, "order-7", 3)],
)
def test_a_large_text_is_accepted_with_few_changes_of_the_thread(
    tmp_path: Path, stream: bool, prompt: str, key: str | None, threads_used: int
) -> None:
    async def accept(threads: RecordingThreads) -> None:
        access: Any = Access()
        acceptance = Acceptance(
            access=access,
            router=Router({}),
            media=MediaStore(tmp_path / "media", b"s" * 32),
            measurer=Measurer(),
        )
        made = call("rest")
        made.idempotency_key = key
        await acceptance.accept(text_task(prompt), TaskOptions(), made, PRINCIPAL, stream=stream)
        assert len(threads.functions) == threads_used

    run(accept)


@pytest.mark.parametrize(
    ("prompt", "answer", "counted"),
    [
        ("a b", "one two three", (2, 3)),
        (PROMPT, "one two three", (WORDS + 1, 3)),
        ("a b", "one " * (LARGE // 4 + 1), (2, LARGE // 4 + 1)),
    ],
    ids=["small", "long prompt", "long answer"],
)
def test_a_whole_answer_without_usage_is_counted_in_a_thread_if_it_is_long(
    tmp_path: Path, prompt: str, answer: str, counted: tuple[int, int]
) -> None:
    async def ask(threads: RecordingThreads) -> None:
        async with open_engine(tmp_path) as engine:
            engine.upstream.when(prompt, Words(answer, usage=None))
            account = await engine.account()
            (result,) = (await engine.ask(account, text_task(prompt))).events
            (record,) = await engine.records(account)
        assert (result.usage.input_tokens, result.usage.output_tokens) == counted
        assert (record.input_tokens, record.output_tokens, record.source) == (*counted, "estimated")
        assert ("count" in threads.functions) == (len(prompt + answer) > LARGE)

    run(ask)
