"""An app without front ends, asked in this process, in front of a server that plays the vendors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pomelo.accounts.plans import Plan
from pomelo.app import App, open_app
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.providers.base import Provider
from pomelo.settings import Settings
from pomelo.stores.accounts import Balance, Grant, Wallet
from pomelo.stores.ledger import LimitStatus
from pomelo.stores.usage import UsageQuery, UsageRecord
from pomelo.testing import FaultUpstream
from tests.integration.asking import call_of
from tests.parity.clients import to_task

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


@dataclass(frozen=True)
class Account:
    """A key of an account, and the wallet that pays for it."""

    key: str
    wallet: Wallet


@dataclass
class Answer:
    """How a task ended: its events (of a task that is not streamed, its result), or the error, and its call."""

    call: Call
    events: list[Any] = field(default_factory=list)
    error: PomeloError | None = None

    @property
    def code(self) -> str:
        """The error's code; `ok` without one."""
        return "ok" if self.error is None else self.error.code

    @property
    def text(self) -> str:
        """The text that a stream delivered."""
        return "".join(event.text_delta.content for event in self.events)


@dataclass(frozen=True)
class EngineApp:
    """A running app, and the vendors that it calls."""

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
        asked: Mapping[str, Any] | Task,
        *,
        stream: bool = False,
        within: float = 20.0,
        protocol: str = "rest",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Runs a task, given as a message or as the body of a REST request, to its end. `within` is in
        seconds, `protocol` is grpc or rest; names of `headers` are in lower case."""
        given = {"authorization": f"Bearer {account.key}", **(headers or {})}
        answer = Answer(Call.from_headers(given.get, protocol=protocol))
        answer.call.deadline = time.monotonic() + within
        task = asked if isinstance(asked, Task) else to_task(asked, stream=stream)
        tasks = self.app.services.tasks
        try:
            if stream:
                async with tasks.stream_task(task, answer.call) as events:
                    async for event in events:
                        answer.events.append(_copy(event))
            else:
                answer.events.append(await tasks.run_task(task, answer.call))
        except PomeloError as error:
            answer.error = error
        return answer

    async def upload(self, account: Account, data: bytes) -> str:
        """Stores audio as the body of a REST request brings it; returns its id."""

        async def chunks() -> AsyncIterator[bytes]:
            yield data

        media = await self.app.services.media.upload_media("audio/ogg", chunks(), call_of(account.key))
        return str(media.media_id)

    async def balance(self, account: Account) -> Balance:
        """The account's credits."""
        return await self.app.store.balance(account.wallet)

    async def limit_status(self, account: Account, model: str = "") -> LimitStatus:
        """What the account uses of its limits; the tokens are those of `model`."""
        return await self.app.store.limit_status(account.wallet, model)

    async def settled(self, account: Account) -> None:
        """Returns once no task of the account has a reservation."""
        async with asyncio.timeout(10):
            while (await self.limit_status(account)).concurrency:
                pass

    async def records(self, account: Account) -> list[UsageRecord]:
        """The account's usage records, newest first."""
        return (await self.app.store.list_usage(UsageQuery(account=account.wallet.account), limit=100))[0]

    def media(self) -> list[str]:
        """The names of all stored media files."""
        return sorted(path.name for path in (self.app.settings.data / "media").iterdir())


def _copy(event: StreamTaskResponse) -> StreamTaskResponse:
    copied = StreamTaskResponse()
    copied.CopyFrom(event)
    return copied


@asynccontextmanager
async def open_engine(
    folder: Path, providers: Mapping[str, Provider] | None = None, **settings: Any
) -> AsyncIterator[EngineApp]:
    """Opens an app that has keys for all vendors but Anthropic. `settings` replace its own, and `providers`
    all that ship with Pomelo."""
    async with FaultUpstream() as upstream:
        given: dict[str, Any] = {
            "rest": "",
            "grpc": "",
            "data": folder / "data",
            "public_url": "https://pomelo.test",
            "openai_api_key": "sk-x",
            "openai_base_url": upstream.openai_base_url,
            "mistral_api_key": "m-x",
            "mistral_base_url": upstream.mistral_base_url,
            "openrouter_api_key": "o-x",
            "openrouter_base_url": upstream.openai_base_url,
            "bfl_api_key": "b-x",
            "bfl_base_url": upstream.bfl_base_url,
            "elevenlabs_api_key": "e-x",
            "elevenlabs_base_url": upstream.elevenlabs_base_url,
            "grace": 1.0,
        }
        async with open_app(Settings(**{**given, **settings}), plans=PLANS, providers=providers) as app:
            yield EngineApp(app, upstream)
