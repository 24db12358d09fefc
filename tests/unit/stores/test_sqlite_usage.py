"""Usage reports are read step by step, and equal one long read."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores.accounts import Wallet
from pomelo.stores.base import Store
from pomelo.stores.sqlite import open_sqlite, usage
from pomelo.stores.usage import DIMENSIONS, Grouping, MetadataKey, UsageQuery, UsageRecord
from tests.unit.accounts.audited_store import ACME, add_account, run

TEAM = MetadataKey("team")
QUERIES = [
    UsageQuery(),
    UsageQuery(live=False),
    UsageQuery(account="acme"),
    UsageQuery(account="acme", live=True),
    UsageQuery(account="nobody"),
    UsageQuery(model="m1"),
    UsageQuery(account="acme", key_id="k2"),
    UsageQuery(since=3.0, until=7.0),
    UsageQuery(since=3.0),
    UsageQuery(until=3.0),
    UsageQuery(account="bee", live=False, model="m0", since=2.0, until=9.0),
    UsageQuery(since=9.0, until=3.0),
]


@pytest.fixture(scope="module")
async def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[UsageRecord]]:
    """A file, and its records as settled: many share a time, and times are unordered."""
    generator = random.Random(7)
    found = []
    path = tmp_path_factory.mktemp("stored") / "pomelo.db"
    async with open_sqlite(path) as store:
        for account in ("acme", "bee"):
            await add_account(store, account, micros=10**9)
        for n in range(300):
            wallet = Wallet(generator.choice(("acme", "bee")), generator.random() < 0.5)
            found.append(
                await run(
                    store,
                    f"t{n}",
                    wallet,
                    model=f"m{generator.randrange(3)}",
                    key_id=f"k{generator.randrange(5)}",
                    at=float(generator.randrange(10)),
                )
            )
    return path, found


@pytest.fixture
def records(stored: tuple[Path, list[UsageRecord]]) -> list[UsageRecord]:
    return stored[1]


@pytest.fixture
async def store(stored: tuple[Path, list[UsageRecord]], tmp_path: Path) -> AsyncIterator[Store]:
    shutil.copyfile(stored[0], tmp_path / "pomelo.db")
    async with open_sqlite(tmp_path / "pomelo.db") as opened:
        yield opened


def matches(query: UsageQuery, record: UsageRecord) -> bool:
    return (
        query.account in (None, record.account)
        and query.live in (None, record.live)
        and query.model in (None, record.model)
        and query.key_id in (None, record.key_id)
        and (query.since is None or record.at >= query.since)
        and (query.until is None or record.at < query.until)
    )


@pytest.mark.parametrize("step", [1, 3, 50, 20_000])
async def test_pages_with_any_step_size_are_the_records_in_order(
    step: int, store: Store, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "STEP", step)
    ordered = sorted(enumerate(records), key=lambda each: (each[1].at, each[0]), reverse=True)
    for query in QUERIES:
        expected = [record.task_id for _, record in ordered if matches(query, record)]
        found, after = [], ""
        while True:
            page, after = await store.list_usage(query, limit=41, after=after)
            found += [record.task_id for record in page]
            if not after:
                break
        assert found == expected, query


@pytest.mark.parametrize("step", [1, 3, 50, 20_000])
async def test_sums_with_any_step_size_are_the_sums_of_the_records(
    step: int, store: Store, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "STEP", step)
    monkeypatch.setattr(usage, "METADATA_STEP", step)
    for query in QUERIES:
        matching = [record for record in records if matches(query, record)]
        for by in DIMENSIONS:
            totals = await store.sum_usage(query, (by,))
            assert sum(total.tasks for total in totals) == len(matching)
            assert sum(total.cost for total in totals) == sum(record.cost for record in matching)
            if by == "key":
                assert [total.groups for total in totals] == sorted({(record.key_id,) for record in matching})
        tasks = Counter((record.key_id, record.model) for record in matching)
        totals = await store.sum_usage(query, ("key", "model"))
        assert [(total.groups, total.tasks) for total in totals] == sorted(tasks.items())
        by_team = [(("", *groups), count) for groups, count in sorted(tasks.items())]
        totals = await store.sum_usage(query, (TEAM, "key", "model"))
        assert [(total.groups, total.tasks) for total in totals] == by_team


async def test_a_sum_is_a_snapshot_even_if_tasks_end_concurrently(
    store: Store, records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "STEP", 10)
    with closing(sqlite3.connect(tmp_path / "pomelo.db")) as reading:
        sums = usage.UsageSum(UsageQuery(), ("account",))
        steps = 0
        while (totals := sums.step(reading)) is None:
            # Tasks with old and new times: those settled during the report do not count.
            await run(store, f"late {steps}", at=float(steps % 12))
            steps += 1
    assert steps > 20
    assert sum(total.tasks for total in totals) == len(records)


async def test_reports_and_tasks_run_concurrently(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "STEP", 5)
    done = 0

    async def traffic() -> None:
        nonlocal done
        for n in range(40):
            await run(store, f"new {n}", ACME)
            done += 1

    running = asyncio.create_task(traffic())
    seen = 300
    while not running.done():
        before = done
        everything = await store.sum_usage(UsageQuery(), ("account",))
        count = sum(total.tasks for total in everything)
        assert 300 + before <= count <= 300 + done + 1
        assert count >= seen
        seen = count
    await running


@pytest.mark.parametrize(
    ("by", "steps"),
    [((), 7), (("model",), 7), ((TEAM,), 31), (("model", TEAM), 31), ((TEAM, MetadataKey("b")), 61)],
)
def test_metadata_is_read_in_smaller_steps(
    by: tuple[Grouping, ...], steps: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "STEP", 50)
    monkeypatch.setattr(usage, "METADATA_STEP", 10)
    with closing(sqlite3.connect(tmp_path / "pomelo.db")) as reading:
        sums = usage.UsageSum(UsageQuery(), by)
        taken = 1
        while sums.step(reading) is None:
            taken += 1
    assert taken == steps


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize(
    ("by", "before"), [(("account",), ()), (("mode", "account"), ("live",)), ((TEAM, "account"), ("",))]
)
def test_a_sum_does_not_collect_more_groups_than_its_page_needs(
    by: tuple[Grouping, ...], before: tuple[str, ...], shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "STEP", 100)
    monkeypatch.setattr(usage, "METADATA_STEP", 100)
    monkeypatch.setattr(usage, "PAGE", 10)
    with closing(sqlite3.connect(":memory:")) as file:
        file.execute(
            "CREATE TABLE usage (account, live, model, key_id, at, input_tokens, output_tokens, characters,"
            " images, audio_ms, output_bytes, cost, uncollected, cached_input_tokens, cache_write_input_tokens,"
            " cache_write_1h_input_tokens, reasoning_tokens, metadata, code)"
        )
        file.execute("CREATE INDEX usage_by_time ON usage (at)")
        order = list(range(2_000)) * 3
        if shuffled:
            random.Random(3).shuffle(order)
        file.executemany(
            "INSERT INTO usage VALUES (printf('a%05d', ?), 1, 'm', 'k', ?, 1, 1, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, '', '')",
            [(n, float(place)) for place, n in enumerate(order)],
        )
        sums = usage.UsageSum(UsageQuery(), by, limit=20, after=(*before, "a00099"))
        largest = 0
        while (totals := sums.step(file)) is None:
            largest = max(largest, len(sums._totals))
    assert [total.groups for total in totals] == [(*before, f"a{n:05d}") for n in range(100, 120)]
    assert {(total.tasks, total.cost) for total in totals} == {(3, 15)}
    assert largest < 200


async def test_a_page_after_a_position_has_no_record_from_the_end_on(store: Store, records: Any) -> None:
    page, after = await store.list_usage(UsageQuery(), limit=10)
    assert after
    found, _ = await store.list_usage(UsageQuery(until=3.0), limit=1_000, after=after)
    assert {record.task_id for record in found} == {record.task_id for record in records if record.at < 3.0}
    found, _ = await store.list_usage(UsageQuery(until=page[-1].at + 1), limit=1_000, after=after)
    assert len(found) == len(records) - 10


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
def test_wallets_are_read_page_by_page_once_each(stored: tuple[Path, list[UsageRecord]], limit: int) -> None:
    found: list[Wallet] = []
    with closing(sqlite3.connect(stored[0])) as connection:
        while page := usage.wallet_states(connection, found[-1] if found else None, limit):
            assert len(page) <= limit
            found += [state.wallet for state in page]
            assert len(found) == len(set(found))
    assert {*found} >= {Wallet(account, live) for account in ("acme", "bee") for live in (False, True)}
