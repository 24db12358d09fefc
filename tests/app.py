"""An app on free ports of loopback in front of a fault upstream, with accounts, a remote gateway and clients."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.accounts.audit import audit
from pomelo.accounts.plans import Plan
from pomelo.app import App, open_app, open_gateway
from pomelo.engine.circuit_breaker import CircuitBreaker
from pomelo.engine.routing import Router
from pomelo.network.addresses import join_address
from pomelo.providers.base import Provider
from pomelo.settings import Settings
from pomelo.stores.accounts import Balance, Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.usage import UsageQuery, UsageRecord
from pomelo.testing import FaultUpstream, VendorProtocol
from tests.driver import Outcome, TaskRequest
from tests.grpc_driver import GrpcDriver
from tests.limits import limits
from tests.rest_driver import RestDriver
from tests.waiting import first

RICH = 10**12
"""Microcredits that no test spends."""

PLANS = {
    plan.name: plan
    for plan in (
        Plan("unlimited"),
        Plan("five", requests=5),
        Plan("wide", requests=10_000, concurrent=2, tokens=1_000),
        Plan("all", requests=1_000, concurrent=50, tokens=100_000),
        Plan("two hundred", requests=200, concurrent=10),
        Plan("images", models=frozenset({"flux-1-pro", "flux-1-dev"})),
    )
}

patient_router = partial(Router, breaker=partial(CircuitBreaker, minimum_calls=10**9))
"""Makes a router whose circuit breakers never open."""

_account_numbers = itertools.count(1)


def app_settings(data: Path, upstream: FaultUpstream, **changes: Any) -> Settings:
    """Returns settings with free ports and with keys for all vendors of the upstream but Anthropic."""
    settings: dict[str, Any] = {"rest": "127.0.0.1:0", "grpc": "127.0.0.1:0", "data": data, "grace": 1.0}
    for vendor in ("openai", "mistral", "bfl", "together", "elevenlabs"):
        settings[f"{vendor}_api_key"] = f"{vendor}-upstream"
    for vendor in ("openai", "anthropic", "mistral", "bfl", "together", "elevenlabs"):
        settings[f"{vendor}_base_url"] = getattr(upstream, f"{vendor}_base_url")
    settings["openrouter_base_url"] = upstream.openai_base_url
    return Settings(**{**settings, **changes})


async def endow(store: Store, account: str = "default") -> None:
    """Removes an account's limits, and grants both its modes more credits than any test can spend."""
    await store.set_plan(account, "unlimited")
    for live in (True, False):
        await store.grant(Grant(f"{account} {live}", Wallet(account, live), 10**13, time.time()))


@dataclass(frozen=True)
class Account:
    """An account, and a key of each mode."""

    name: str
    test: str
    live: str


@dataclass
class RunningApp:
    """A running app, its upstream, and clients of its front ends and of a remote gateway."""

    server: App
    upstream: FaultUpstream
    session: aiohttp.ClientSession
    channel: grpc.aio.Channel
    urls: Mapping[str, str]
    """The gateway's base URL by protocol: `rest` or `remote`."""

    def __post_init__(self) -> None:
        self._grpc = GrpcDriver(self.channel)
        self._rest = {protocol: RestDriver(self.session, url) for protocol, url in self.urls.items()}

    async def account(
        self, plan: str = "unlimited", test: int = RICH, live: int = RICH, models: tuple[str, ...] = ()
    ) -> Account:
        """Creates an account with that many microcredits in test and live mode, and with keys for `models`
        (empty: all)."""
        name = f"account-{next(_account_numbers)}"
        store, keyring = self.server.store, self.server.keyring
        await store.add_account(name, plan, time.time())
        for is_live, micros in ((False, test), (True, live)):
            if micros:
                await store.grant(Grant(f"{name} {is_live}", Wallet(name, is_live), micros, time.time()))
        keys = [(await keyring.create(name, live=is_live, models=models))[1] for is_live in (False, True)]
        return Account(name, *keys)

    def media(self) -> set[Path]:
        """Returns the files of the media folder."""
        return set((self.server.settings.data / "media").iterdir())

    async def records(self, account: Account, **filters: Any) -> list[UsageRecord]:
        """Returns an account's usage records, newest first."""
        query = UsageQuery(account=account.name, **filters)
        return (await self.server.store.list_usage(query, limit=1000))[0]

    async def only_record(
        self, account: Account, response: Outcome | None = None, *, live: bool = True
    ) -> UsageRecord:
        """Returns an account's only usage record. Asserts that it is the only charge, that nothing is reserved or
        uncollected, that `response` reports its cost if it reports one, and that the audit finds nothing."""
        (record,) = await self.records(account)
        balance = await self.balance(account, live=live)
        assert (balance.spent, balance.held, record.uncollected) == (record.cost, 0, 0)
        if response is not None and "x-credits-charged" in response.metadata:
            assert round(float(response.metadata["x-credits-charged"]) * 10**6) == record.cost
        await self.assert_audit_clean()
        return record

    async def balance(self, account: Account, *, live: bool = False) -> Balance:
        """Returns an account's credits in one mode."""
        return await self.server.store.balance(Wallet(account.name, live))

    async def concurrency(self, account: Account, *, live: bool = False) -> int:
        """Returns how many tasks an account is running in one mode."""
        return (await limits(self.server.store, Wallet(account.name, live))).concurrency

    async def idle(self, account: Account, *, live: bool = False) -> None:
        """Returns when an account runs no task and has no reservation in one mode."""

        async def busy() -> int:
            tasks = await self.concurrency(account, live=live)
            return tasks or (await self.balance(account, live=live)).held

        await first(busy, lambda tasks_or_credits: tasks_or_credits == 0)

    async def assert_audit_clean(self) -> None:
        """Asserts that the audit finds nothing, and nothing that was not collected."""
        report = await audit(self.server.store)
        assert not report.findings
        assert report.uncollected_micros == 0

    async def ask(
        self,
        protocol: str,
        key: str,
        body: Mapping[str, Any],
        *,
        stream: bool = False,
        accept: str | None = None,
        form: bool = False,
        within: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Runs a task to its end. `accept` and `form` apply to REST alone; `within` is the timeout in
        seconds."""
        request = TaskRequest(body, key, stream, timeout=within, headers=headers or {}, form=form)
        if protocol == "grpc":
            return await self._grpc(request)
        if accept:
            request.headers = {**request.headers, "Accept": accept}
        return await self._rest[protocol](request)

    async def post(
        self, protocol: str, key: str, *, headers: Mapping[str, str] | None = None, **body: Any
    ) -> aiohttp.ClientResponse:
        """Posts a task to REST with `json` or `data` of aiohttp; returns the answer, whose body was read."""
        url = f"{self.urls[protocol]}/api/v1/task"
        sent = {"Authorization": f"Bearer {key}", **(headers or {})}
        answer = await self.session.post(url, headers=sent, **body)
        await answer.read()
        return answer

    async def lines(
        self, protocol: str, key: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> list[bytes]:
        """Streams a task over REST; returns the lines. aiohttp refuses a line of 64 KiB."""
        url = f"{self.urls[protocol]}/api/v1/task"
        sent = {"Authorization": f"Bearer {key}", **(headers or {})}
        async with self.session.post(url, json={**body, "stream": True}, headers=sent) as answer:
            return [line async for line in answer.content]

    async def get_json(self, protocol: str, key: str, path: str) -> Any:
        """Gets a path of REST; returns the JSON of the answer."""
        headers = {"Authorization": f"Bearer {key}"}
        async with self.session.get(self.urls[protocol] + path, headers=headers) as answer:
            return await answer.json()

    async def get(self, protocol: str, key: str, path: str, **headers: str) -> Outcome:
        """Gets a path of REST; over gRPC lists the models, whatever the path."""
        if protocol == "grpc":
            return await self._grpc.list_models(key)
        return await self._rest[protocol].get(path, key, **headers)


@asynccontextmanager
async def run_app(
    folder: Path,
    *,
    plans: Mapping[str, Plan] = PLANS,
    make_router: Callable[[Mapping[str, Provider]], Router] = patient_router,
    settings: Mapping[str, Any] | None = None,
    gateway_settings: Mapping[str, Any] | None = None,
    protocols: Iterable[VendorProtocol] = (),
    **overrides: Any,
) -> AsyncIterator[RunningApp]:
    """Runs an app, and a gateway that reaches it over gRPC, on free ports. `settings` replace those of
    `app_settings`; `gateway_settings` are added to those of the gateway; `protocols` are further vendors of the
    upstream; `overrides` go to `open_app`."""
    async with FaultUpstream(protocols=protocols) as upstream:
        own = app_settings(folder / "data", upstream, **{"upstream_connections": 256, **(settings or {})})
        async with (
            open_app(own, plans=plans, make_router=make_router, **overrides) as server,
            aiohttp.ClientSession() as session,
        ):
            assert server.rest is not None
            assert server.grpc is not None
            remote = Settings(
                rest="127.0.0.1:0",
                data=folder / "gateway",
                secret=own.root_secret().decode(),
                grace=1.0,
                **(gateway_settings or {}),
            )
            options = [("grpc.max_receive_message_length", 2**26)]
            async with (
                open_gateway(remote, server.grpc) as (host, port),
                grpc.aio.insecure_channel(server.grpc, options) as channel,
            ):
                addresses = {"rest": server.rest, "remote": (host, port)}
                urls = {name: f"http://{join_address(*address)}" for name, address in addresses.items()}
                yield RunningApp(server, upstream, session, channel, urls)


def app_fixture(**options: Any) -> Any:
    """Returns a fixture of a module: a running app; `options` go to `run_app`."""

    @pytest.fixture(scope="module")
    async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
        async with run_app(tmp_path_factory.mktemp("app"), **options) as opened:
            yield opened

    return app
