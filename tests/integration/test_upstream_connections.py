"""A small limit of connections to a vendor: how many one account can use, and how its other tasks are refused."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from pomelo.accounts.audit import audit
from pomelo.testing import Answer, Gate
from tests.app import Account, RunningApp, app_fixture, run_app
from tests.driver import PROTOCOL, PROTOCOLS, Outcome
from tests.tasks import TASK_BODIES, text_body
from tests.waiting import until

LIMIT = 8
SHARE = 7
"""The number of connections, of LIMIT, that one account can use."""

WORDS = "one two three"

app = app_fixture(settings={"upstream_connections": LIMIT})


def start(
    app: RunningApp, protocol: str, account: Account, prompt: str, *, stream: bool
) -> asyncio.Task[Outcome]:
    """Starts a text task with a live key."""
    return asyncio.create_task(
        app.ask(protocol, account.live, text_body(prompt, max_tokens=20), stream=stream)
    )


async def test_tasks_above_an_accounts_share_are_refused_and_another_account_is_served_immediately(
    app: RunningApp,
) -> None:
    connections = app.server.connections
    busy, other = await app.account("all"), await app.account("all")
    refused_before = connections.refused
    gate = Gate()
    app.upstream.when("hold", Answer(WORDS, at={1: gate}))
    streams = [start(app, PROTOCOLS[n % 3], busy, "hold", stream=True) for n in range(SHARE)]
    await until(lambda: connections.in_use == SHARE)

    async def timed(key: str, protocol: str, prompt: str, stream: bool) -> tuple[str, int, float, str]:
        start = time.monotonic()
        outcome = await app.ask(protocol, key, text_body(prompt, max_tokens=20), stream=stream)
        return outcome.code, outcome.status, time.monotonic() - start, outcome.metadata.get("retry-after", "")

    surplus = [
        asyncio.create_task(timed(busy.live, protocol, "surplus", stream))
        for protocol in PROTOCOLS
        for stream in (False, True)
    ]
    await until(lambda: connections.waiting == len(surplus))
    for protocol in PROTOCOLS:
        for stream in (False, True):
            code, _, seconds, _ = await timed(other.live, protocol, "Hello", stream)
            assert code == "ok"
            assert seconds < 3, "it did not wait like those of the other account"
    refused = await asyncio.gather(*surplus)
    assert {code for code, *_ in refused} == {"overloaded"}
    assert {(status, wait) for _, status, _, wait in refused[2:]} == {(503, "1")}
    assert max(seconds for _, _, seconds, _ in refused) < 20
    assert connections.refused - refused_before == len(surplus)
    assert not [request for request in app.upstream.requests if "surplus" in request.prompt]

    gate.open()
    outcomes = [(one.code, one.content, one.done) for one in await asyncio.gather(*streams)]
    assert outcomes == [("ok", WORDS, True)] * SHARE
    await until(lambda: not connections.in_use)
    assert connections.waiting == 0
    balance = await app.balance(busy, live=True)
    records = await app.records(busy)
    assert balance.held == 0
    assert balance.spent == sum(record.cost for record in records)
    assert len(records) == SHARE
    assert await app.concurrency(busy, live=True) == 0
    last = await app.ask("rest", busy.live, text_body("Hello", max_tokens=20))
    left = int(last.headers["x-ratelimit-remaining"])
    assert left == 1_000 - SHARE - 1, "a refused call counts toward no limit"
    report = await audit(app.server.store)
    assert not report.findings
    assert (report.difference_micros, report.reservations) == (0, 0)


@PROTOCOL
async def test_a_waiting_caller_who_leaves_is_removed_from_the_queue_immediately(
    app: RunningApp, protocol: str
) -> None:
    connections = app.server.connections
    account = await app.account()
    gate = Gate()
    app.upstream.when(f"stay {protocol}", Answer(WORDS, at={1: gate}))
    streams = [start(app, protocol, account, f"stay {protocol}", stream=True) for _ in range(SHARE)]
    await until(lambda: connections.in_use == SHARE)
    refused = connections.refused
    waiting = [start(app, protocol, account, f"left {protocol}", stream=on) for on in (False, True)]
    await until(lambda: connections.waiting == 2)
    for call in waiting:
        call.cancel()
    await until(lambda: not connections.waiting)
    assert connections.refused == refused, "callers who leave are not refused"
    await asyncio.gather(*waiting, return_exceptions=True)
    gate.open()
    await asyncio.gather(*streams)
    await until(lambda: not connections.in_use)
    assert not [request for request in app.upstream.requests if f"left {protocol}" in request.prompt]
    assert (await app.balance(account, live=True)).held == 0
    assert len(await app.records(account)) == SHARE


async def test_every_task_type_needs_only_one_connection(tmp_path: Path) -> None:
    async with run_app(tmp_path, settings={"upstream_connections": 1}) as app:
        account = await app.account()
        outcomes = await asyncio.gather(
            *[
                app.ask(protocol, account.live, body, stream=stream)
                for protocol in PROTOCOLS
                for body in TASK_BODIES.values()
                for stream in (False, True)
            ]
        )
        assert [one.code for one in outcomes] == ["ok"] * len(outcomes)
        assert app.server.connections.waited > 0
        assert app.server.connections.in_use == app.server.connections.waiting == 0
