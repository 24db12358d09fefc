"""More concurrent calls than the server accepts: each gets a documented answer, and health answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import grpc

from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import as_dict, bearer, reason_of
from tests.faults.other_callers import other_callers
from tests.faults.test_unauthenticated import command
from tests.load.rest_attacks import head
from tests.serving import serve_interpreter
from tests.tasks import text_body, text_task

log = logging.getLogger(__name__)

FULL = "LOAD_CALLS" in os.environ
CALLS = 1_600 if FULL else 300
MAX_CALLS = CALLS * 5 // 4

REQUESTS = 3_000 if FULL else 600
MAX_CONNECTIONS = REQUESTS // 6


async def test_every_connection_above_the_limit_is_refused_as_overloaded(tmp_path: Path) -> None:
    async with serve_interpreter(tmp_path, POMELO_MAX_CONNECTIONS=str(MAX_CONNECTIONS)) as served:
        await command(served, "accounts", "plan", "default", "unlimited")
        await command(served, "accounts", "grant", "default", "1000", "--test")
        body = json.dumps(text_body("[[delay:1]] Hello", max_tokens=5)).encode()
        request = head(served.key, len(body), Connection="close") + body

        async def run_task() -> str:
            reader, writer = await asyncio.open_connection(served.host, served.port)
            writer.write(request)
            answer_head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            if b" 200 " in answer_head.partition(b"\r\n")[0]:
                return "ok"
            assert b"\r\nRetry-After: 1\r\n" in answer_head
            return str(json.loads(answer)["error"]["code"])

        answers = Counter(await asyncio.gather(*[run_task() for _ in range(REQUESTS)]))
    log.info("%s", answers)
    assert set(answers) == {"ok", "overloaded"}


async def test_every_call_gets_a_documented_answer_and_health_answers_throughout(tmp_path: Path) -> None:
    async with serve_interpreter(tmp_path, POMELO_MAX_CALLS=str(MAX_CALLS)) as served:
        await command(served, "accounts", "plan", "default", "unlimited")
        await command(served, "accounts", "grant", "default", "1000", "--test")
        address = f"{served.host}:{served.grpc_port}"
        options = [("grpc.use_local_subchannel_pool", 1)]
        task = text_task("[[delay:1]] Hello")
        task.text.max_tokens = 5

        async def run_task(channel: grpc.aio.Channel) -> str:
            call = TaskServiceStub(channel).RunTask(
                RunTaskRequest(spec=task), metadata=bearer(served.key), timeout=60
            )
            try:
                await call
            except grpc.aio.AioRpcError as error:
                wait = as_dict(error.trailing_metadata()).get("retry-after")
                return f"{reason_of(error)} {wait}" if reason_of(error) else str(error)
            return "ok"

        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(address, options)) for _ in range(4)
            ]
            async with other_callers(served, "grpc_health") as callers:
                calls = [run_task(channel) for channel in itertools.islice(itertools.cycle(channels), CALLS)]
                answers = Counter(await asyncio.gather(*calls))
    waits = sorted(callers.all_waits)
    p95 = waits[len(waits) * 95 // 100]
    log.info("%s, health: %d answers, p95 %.3f s, longest %.3f s", answers, len(waits), p95, waits[-1])
    assert not callers.errors
    assert set(answers) == {"ok", "overloaded 1"}
    assert answers["ok"] >= MAX_CALLS // 2, "one account may have half of all calls"
    assert len(waits) > 20
    assert p95 < 0.25
    assert waits[-1] < 1.0, "on an idle machine it is below 0.25"
