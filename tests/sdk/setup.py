"""Where clients of OpenAI's API are tested: servers and keys, a limit that is reached, and vendors that are busy."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from pomelo.testing import Received, Reply, Transcript, error_reply
from pomelo.testing.upstream import PROTOCOLS
from tests import node_client
from tests.app import Account, RunningApp
from tests.sdk.matrix import CLIENTS, TARGETS
from tests.sdk.python_clients import PYTHON_CLIENTS, PythonClient, Target
from tests.unit.telemetry.reports import Reports

SCRIPTS = Path(__file__).parent / "js"
SENTENCES = ["Good morning to you.", "How are you today?"]
TEXT = " ".join(SENTENCES)
LIVE_ANSWER = "Hello from the upstream."
BUSY = "The vendor is busy"

reports = Reports()
"""The ends of all tasks of the app that is tested."""


def answer(received: Received) -> Reply:
    """The vendors' usual replies, but a transcript of the text."""
    script = next(one for one in PROTOCOLS if one.serves(received)).default
    if received.path.endswith("/speech-to-text"):
        script = Transcript(TEXT)
    return script if isinstance(script, Reply) else script(received)


class BusyFirst:
    """A vendor that refuses the first request of each prompt."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, received: Received) -> Reply:
        if received.prompt in self._seen:
            return answer(received)
        self._seen.add(received.prompt)
        return error_reply(
            429, code="rate_limit_exceeded", headers={"Retry-After": "7"}
        )  # too long for Pomelo


@dataclass
class Slot:
    """An account with one concurrent task, which is held and released."""

    app: RunningApp
    account: Account
    mode: str
    _running: list[aiohttp.ClientResponse] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.account.test if self.mode == "test" else self.account.live

    async def hold(self) -> None:
        """Takes the slot in the sandbox. In live mode it is the vendor that refuses."""
        if self.mode == "live":
            return
        body = {
            "model": "gpt-4",
            "messages": [{"role": "user", "content": "[[words:9]] [[stall]]"}],
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {self.key}"}
        url = f"{self.app.urls['rest']}/v1/chat/completions"
        response = await self.app.session.post(url, json=body, headers=headers)
        assert response.status == 200
        self._running.append(response)

    async def release(self) -> None:
        """Returns when the slot is free."""
        while self._running:
            self._running.pop().close()
        await self.app.idle(self.account, live=self.mode == "live")

    def codes(self) -> list[str]:
        """Returns the ends of the account's tasks in their order, without the one that was held."""
        tasks = [task for task in reports.tasks if task.account == self.account.name]
        return [task.code or "ok" for task in tasks if task.outcome != "cancelled"]


@dataclass
class Setup:
    """All that the checks need."""

    app: RunningApp
    targets: dict[str, Target]
    slots: dict[str, Slot] = field(default_factory=dict)
    _of_python: dict[tuple[str, str], PythonClient] = field(default_factory=dict)
    _of_node: dict[str, asyncio.Future[dict[tuple[str, str], list[Any]]]] = field(default_factory=dict)

    async def target(self, client: str, name: str) -> Target:
        """Returns a target with a slot of its own."""
        place = f"{client}-{name}"
        if place not in self.slots:
            self.slots[place] = Slot(self.app, await self.app.account("one"), name.rpartition("-")[2])
        target = self.targets[name]
        changes = {
            "retry_key": self.slots[place].key,
            "retry_prompt": f"{BUSY}: {place}",
            "control": f"{target.control}/{place}",
        }
        return target.model_copy(update=changes)

    async def of_python(self, client: str, name: str) -> PythonClient:
        """Returns a client for Python with its target."""
        if (client, name) not in self._of_python:
            target, slot = await self.target(client, name), self.slots[f"{client}-{name}"]
            self._of_python[client, name] = PYTHON_CLIENTS[client](target, slot.hold, slot.release)
        return self._of_python[client, name]

    async def aclose(self) -> None:
        for client in self._of_python.values():
            await client.aclose()

    async def of_node(self, client: str, modules: Path) -> dict[tuple[str, str], list[Any]]:
        """Returns the results of a client for Node.js by check and target: with the error, if a check failed. It is
        run once, even if it fails."""
        if client not in self._of_node:
            self._of_node[client] = asyncio.ensure_future(self._run_node(client, modules))
        return await self._of_node[client]

    async def _run_node(self, client: str, modules: Path) -> dict[tuple[str, str], list[Any]]:
        checks = [*CLIENTS[client].features, *(["media"] if client == "node" else [])]
        targets = [(await self.target(client, name)).model_dump(exclude={"audio"}) for name in TARGETS]
        argument = {"targets": targets, "checks": checks, "audio": self.targets[TARGETS[0]].audio}
        printed = await node_client.output(modules, str(SCRIPTS / CLIENTS[client].script), argument)
        lines = [json.loads(line) for line in printed.splitlines()]
        return {(check, target): result for check, target, *result in lines}
