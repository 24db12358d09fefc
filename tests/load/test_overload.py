"""More concurrent gRPC calls than the server accepts: each gets a documented answer, and health answers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import grpc

from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import as_dict, bearer, reason_of
from tests.faults.test_unauthenticated import command
from tests.serving import serve
from tests.tasks import text_task

log = logging.getLogger(__name__)

CALLS = 1_600 if "LOAD_CALLS" in os.environ else 300
MAX_CALLS = CALLS * 5 // 4

PROBE = """
import json, sys, time, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
health = health_pb2_grpc.HealthStub(grpc.insecure_channel(sys.argv[1]))
waits = []
while True:
    began = time.monotonic()
    health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    waits.append(time.monotonic() - began)
    print(json.dumps(waits[-1]), flush=True)
    time.sleep(0.01)
"""
"""A client in a separate process: a busy client must not look like a busy server."""


async def test_every_call_gets_a_documented_answer_and_health_answers_throughout(tmp_path: Path) -> None:
    async with serve(tmp_path, POMELO_MAX_CALLS=str(MAX_CALLS)) as served:
        await command(served, "accounts", "plan", "default", "unlimited")
        await command(served, "accounts", "grant", "default", "1000", "--test")
        address = f"{served.host}:{served.grpc_port}"
        probe = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROBE, address, stdout=subprocess.PIPE
        )
        assert probe.stdout is not None
        await probe.stdout.readline()
        channels = [
            grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)
        ]
        task = text_task("[[delay:1]] Hello")
        task.text.max_tokens = 5

        async def run_task(number: int) -> str:
            stub = TaskServiceStub(channels[number % len(channels)])
            try:
                await stub.RunTask(RunTaskRequest(task=task), metadata=bearer(served.key), timeout=60)
            except grpc.aio.AioRpcError as error:
                wait = as_dict(error.trailing_metadata()).get("retry-after")
                return f"{reason_of(error)} {wait}" if reason_of(error) else str(error)
            return "ok"

        answers = Counter(await asyncio.gather(*[run_task(number) for number in range(CALLS)]))
        probe.kill()
        waits = sorted(json.loads(line) for line in (await probe.stdout.read()).splitlines())
        for channel in channels:
            await channel.close()
    p95 = waits[len(waits) * 95 // 100]
    log.info("%s, health: %d answers, p95 %.3f s, longest %.3f s", answers, len(waits), p95, waits[-1])
    assert set(answers) == {"ok", "overloaded 1"}
    assert answers["ok"] >= MAX_CALLS // 2, "one account may have half of all calls"
    assert len(waits) > 20
    assert p95 < 0.25
    assert waits[-1] < 1.0, "on an idle machine it is below 0.25"
