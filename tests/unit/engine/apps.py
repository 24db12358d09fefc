"""An app without front ends whose engine is called in this process, in front of a fault upstream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts.plans import Plan
from pomelo.app import App, open_app
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.providers.base import Provider
from pomelo.providers.chunks import event_text
from pomelo.stores.accounts import Balance, Grant, Wallet
from pomelo.stores.usage import UsageQuery, UsageRecord
from pomelo.telemetry.events import Observer
from pomelo.testing import FaultUpstream
from tests.app import app_settings
from tests.calls import call_of
from tests.limits import Used, limits
from tests.tasks import to_options, to_task

CREDITS = 10**9
"""Microcredits of a new account, unless a test says otherwise."""

PLANS = {
    plan.name: plan
    for plan in (
        Plan("unlimited"),
        Plan("limited", requests=5, concurrent=2, tokens=100_000),
        Plan("one request", requests=1),
        Plan("images", models=frozenset({"flux-1-pro"})),
    )
}

STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
PROTOCOL = pytest.mark.parametrize("protocol", ["grpc", "rest"])
LIVE = pytest.mark.parametrize("live", [False, True], ids=["test", "live"])


@dataclass(frozen=True)
class Account:
    """A key of an account, and the wallet that pays for it."""

    key: str
    wallet: Wallet


@dataclass
class Answer:
    """The call of a task, and its events (its result if it was not streamed) or its error."""

    call: Call
    events: list[Any] = field(default_factory=list)
    error: PomeloError | None = None

    @property
    def code(self) -> str:
        """The error's code; `ok` without one."""
        return "ok" if self.error is None else self.error.code

    @property
    def text(self) -> str:
        """The text of a stream; for a REST call, its end may be in `completed`."""
        return "".join(map(event_text, self.events))


@dataclass(frozen=True)
class EngineApp:
    """A running app, and its upstream."""

    app: App
    upstream: FaultUpstream

    async def account(
        self,
        plan: str = "unlimited",
        micros: int = CREDITS,
        *,
        live: bool = True,
        models: tuple[str, ...] = (),
    ) -> Account:
        """Creates an account with a key that may use `models` (empty: all)."""
        name = f"account-{time.monotonic_ns()}"
        wallet = Wallet(name, live)
        await self.app.store.add_account(name, plan, time.time())
        if micros:
            await self.app.store.grant(Grant(name, wallet, micros, time.time()))
        return Account((await self.app.keyring.create(name, live=live, models=models))[1], wallet)

    async def ask(
        self,
        account: Account,
        task: Mapping[str, Any] | TaskSpec,
        *,
        stream: bool = False,
        options: TaskOptions | None = None,
        within: float = 20.0,
        protocol: str = "rest",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Runs a task, a message or the body of a REST request, to its end. `options` replace those of the
        body. `within` is its timeout in seconds, `protocol` is grpc or rest; names of `headers` are in lower
        case."""
        sent = {"authorization": f"Bearer {account.key}", **(headers or {})}
        answer = Answer(Call.from_headers(sent.get, protocol=protocol))
        answer.call.deadline = time.monotonic() + within
        if isinstance(task, TaskSpec):
            spec, options = task, options or TaskOptions()
        else:
            spec, options = to_task(task), options or to_options(task, stream=stream)
        tasks = self.app.services.tasks
        try:
            if stream:
                async with tasks.stream_task(spec, options, answer.call) as events:
                    async for event in events:
                        answer.events.append(_copy(event))
            else:
                answer.events.append(await tasks.run_task(spec, options, answer.call))
        except PomeloError as error:
            answer.error = error
        return answer

    async def upload(
        self, account: Account, data: bytes, content_type: str = "audio/ogg", *, protocol: str = "rest"
    ) -> str:
        """Stores a file, like a REST request with audio as its body or like a gRPC caller; returns its id."""

        async def chunks() -> AsyncIterator[bytes]:
            yield data

        call = call_of(account.key)
        call.protocol = protocol
        return (await self.app.services.media.upload_media(content_type, chunks(), call)).id

    async def balance(self, account: Account) -> Balance:
        """Returns the account's credits."""
        return await self.app.store.balance(account.wallet)

    async def used(self, account: Account) -> Used:
        """Returns what the account has used of its limits; the tokens are those of gpt-4."""
        return await limits(self.app.store, account.wallet)

    async def settled(self, account: Account) -> None:
        """Returns when no task of the account has a reservation."""
        async with asyncio.timeout(20):
            while (await self.used(account)).concurrency:
                pass

    async def records(self, account: Account) -> list[UsageRecord]:
        """Returns the account's usage records, newest first."""
        return (await self.app.store.list_usage(UsageQuery(account=account.wallet.account), limit=100))[0]

    async def failures(self, account: Account) -> list[UsageRecord]:
        """Returns the records of the account's tasks that failed, newest first."""
        query = UsageQuery(account=account.wallet.account, failed=True)
        return (await self.app.store.list_usage(query, limit=100))[0]

    def media(self) -> list[str]:
        """Returns the names of all stored media files."""
        return sorted(path.name for path in (self.app.settings.data / "media").iterdir())


def _copy(event: TaskEvent) -> TaskEvent:
    copied = TaskEvent()
    copied.CopyFrom(event)
    return copied


@asynccontextmanager
async def open_engine(
    folder: Path,
    providers: Mapping[str, Provider] | None = None,
    observers: Sequence[Observer] = (),
    **settings: Any,
) -> AsyncIterator[EngineApp]:
    """Opens an app with keys for all vendors but Anthropic. `settings` replace those of the app, and
    `providers` replace all of Pomelo's; `observers` get its reports."""
    async with FaultUpstream() as upstream:
        own: dict[str, Any] = {
            "rest": "",
            "grpc": "",
            "public_url": "https://pomelo.test",
            "openrouter_api_key": "openrouter-upstream",
            "openrouter_base_url": upstream.openai_base_url,
        }
        own_settings = app_settings(folder / "data", upstream, **(own | settings))
        async with open_app(own_settings, plans=PLANS, providers=providers, observers=observers) as app:
            yield EngineApp(app, upstream)
