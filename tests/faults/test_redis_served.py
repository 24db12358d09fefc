"""A server whose Redis hangs or dies: no new task reaches a provider, and running tasks are settled
afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.testing import Answer, FaultUpstream, Gate
from tests.integration.commands import live_key, pomelo
from tests.redis_server import RedisServer
from tests.serving import Served, serve

REFUSED_WITHIN = 1.0
"""Seconds from a task to its refusal."""

OUTAGES: dict[str, tuple[Callable[[RedisServer], Any], Callable[[RedisServer], Any]]] = {
    "it hangs": (RedisServer.stop, RedisServer.resume),
    "it is killed and started again": (RedisServer.kill, RedisServer.start),
}


def body(prompt: str, **more: Any) -> dict[str, Any]:
    """A text task."""
    return {"model": "gpt-4", "messages": [{"role": "user", "content": prompt}], "max_tokens": 10, **more}


class Client:
    """A caller with a live key."""

    def __init__(self, served: Served, session: aiohttp.ClientSession) -> None:
        self._url = f"{served.url}/api/v1/task"
        self._session = session

    async def ask(self, prompt: str, **more: Any) -> tuple[int, str]:
        """The status and the text of an answer."""
        async with self._session.post(self._url, json=body(prompt, **more)) as answer:
            return answer.status, await answer.text()


@pytest.mark.parametrize("outage", OUTAGES)
async def test_no_provider_is_called_in_an_outage_and_running_tasks_are_settled_after_it(
    tmp_path: Path, outage: str
) -> None:
    begin, end = OUTAGES[outage]
    async with FaultUpstream() as upstream:
        variables = {"OPENAI_API_KEY": "sk-upstream", "OPENAI_BASE_URL": upstream.openai_base_url}
        with RedisServer() as redis:
            variables["POMELO_STORE"] = redis.url
            async with serve(tmp_path, **variables) as served:
                key = await live_key(tmp_path, **variables)
                headers = {"Authorization": f"Bearer {key}"}
                async with aiohttp.ClientSession(headers=headers) as session:
                    client = Client(served, session)
                    assert (await client.ask("before"))[0] == 200
                    gate = Gate()
                    upstream.when("running", Answer("one two three", at={2: gate}))
                    running = asyncio.create_task(client.ask("running", stream=True))
                    await gate.reached.wait()
                    calls = len(upstream.requests)
                    begin(redis)
                    for number in range(3):
                        began = time.monotonic()
                        status, text = await client.ask(f"refused {number}")
                        assert time.monotonic() - began < REFUSED_WITHIN + 0.5
                        assert status == 503, text
                        assert "store_unavailable" in text
                    assert len(upstream.requests) == calls, "a provider was called without a reservation"
                    await asyncio.to_thread(end, redis)
                    gate.open()
                    status, text = await running
                    assert status == 200
                    async with asyncio.timeout(20):
                        while (await client.ask("after"))[0] != 200:  # noqa: ASYNC110 (there is no event to wait for)
                            await asyncio.sleep(0.1)
                audited = await pomelo(tmp_path, "audit", **variables)
                assert audited.status == 0, audited.out
                assert audited.out.strip().endswith("Difference: none")
                assert ", 0 running tasks;" in audited.out
                shown = await pomelo(tmp_path, "usage", "--format", "json", **variables)
                done = "data: [DONE]" in text
                assert (
                    shown.out.count('"request_id"') == 3
                    if done
                    else shown.out.count('"request_id"') in (2, 3)
                )
