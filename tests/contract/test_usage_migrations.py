"""Usage records of earlier versions, in files and archives, are read by this one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts.audit import audit
from pomelo.stores.accounts import Balance
from pomelo.stores.archive import open_archive
from pomelo.stores.base import StoreError
from pomelo.stores.ledger import IdempotencyKey, ReplayedAnswer, ReserveRequest, Settlement
from pomelo.stores.schema import ARCHIVE_MIGRATIONS
from pomelo.stores.usage import MetadataKey, UsageQuery, UsageRecord, encode_metadata
from tests.contract.earlier_files import left_by, open_at
from tests.contract.ledger_rig import WALLET, record

# --- version 3: records without cache counts, prices without tiers


AT_3 = 1_795_663_008.25
"""When version 3 ended."""


@pytest.fixture
def version_3(tmp_path: Path) -> Path:
    """A file as version 3 wrote it: two bills, one of them partly uncollected."""
    return left_by(3, tmp_path)


async def test_bills_of_version_3_are_recomputed_with_their_own_prices(version_3: Path) -> None:
    for _ in range(2):
        async with open_at(version_3, AT_3) as store:
            found = await audit(store)
            assert not found.findings
            assert (found.records, found.cost_micros, found.uncollected_micros) == (2, 1_000_000, 1_060_200)
            (second, first), _ = await store.list_usage(UsageQuery(account="acme"), limit=9)
            assert (first.input_tokens, first.cached_input_tokens, first.cost) == (10_000, 0, 40_200)
            assert second.prices == "million_input_tokens=4000000,million_output_tokens=20000000"
            (total,) = await store.sum_usage(UsageQuery(), ("model",))
            assert (total.input_tokens, total.cached_input_tokens) == (510_000, 0)


async def test_a_file_of_version_3_replays_answers_and_stores_new_counts(version_3: Path) -> None:
    async with open_at(version_3, AT_3) as store:
        again = ReserveRequest(record("task_9"), 0, 0, idempotency_key=IdempotencyKey("again", b"f"))
        assert isinstance(await store.reserve(again), ReplayedAnswer)
        ended = record("task_2", input_tokens=9, cached_input_tokens=5, cache_write_input_tokens=3)
        await store.reserve(ReserveRequest(ended, 0, 0))
        await store.settle(Settlement(ended))
        (newest, *_), _ = await store.list_usage(UsageQuery(), limit=9)
        assert newest.task_id == "task_1"
        (total,) = await store.sum_usage(UsageQuery(), ("model",))
        assert (total.cached_input_tokens, total.cache_write_input_tokens) == (5, 3)


async def test_a_file_of_version_3_stores_costs_reported_by_providers(version_3: Path) -> None:
    ended = record("task_3", provider_micros=70, prices="image=40000,provider_dollar=1100000", cost=77)
    async with open_at(version_3, AT_3) as store:
        await store.reserve(ReserveRequest(ended, 0, 0))
        await store.settle(Settlement(ended))
    async with open_at(version_3, AT_3) as store:
        *old, new = (await store.list_usage(UsageQuery(), limit=9))[0]
        assert [each.provider_micros for each in old] == [0, 0]
        assert (new.task_id, new.provider_micros, new.uncollected) == ("task_3", 70, 77)
        assert not (await audit(store)).findings


# --- version 5: records without reasoning tokens, user and metadata


AT_5 = 1_795_690_000.25
"""When version 5 ended: two tasks of acme have ended, and two run."""

PRICES_5 = ",".join([
    "million_input_tokens=4000000",
    "million_cached_input_tokens=400000",
    "million_cache_write_input_tokens=5000000",
    "million_output_tokens=20000000",
])  # fmt: skip


@pytest.fixture
def version_5(tmp_path: Path) -> Path:
    """A file as version 5 left it when its process died."""
    return left_by(5, tmp_path)


def ended_5(task_id: str, **changes: Any) -> UsageRecord:
    """The record of a task that ended in version 5."""
    values: dict[str, Any] = {
        **{"request_id": "req_1", "key_id": "k1", "model": "claude-3-opus", "provider": "anthropic"},
        **{"provider_model": "m", "input_tokens": 1_000, "cached_input_tokens": 500, "output_tokens": 50},
        **{"cache_write_input_tokens": 200, "cache_write_1h_input_tokens": 100, "processing_ms": 9},
        **{"first_byte_ms": 4, "output_bytes": 80, "cost": 3_400, "prices": PRICES_5},
        **{"price_version": "2026-11-22", "reasoning_tokens": 0, "user": "", "metadata": ""},
    }
    return record(task_id, **(values | changes))


async def test_records_of_version_5_are_read_unchanged_and_its_running_tasks_are_recovered(
    version_5: Path,
) -> None:
    for _ in range(2):
        async with open_at(version_5, AT_5) as store:
            assert not (await audit(store)).findings
            assert await store.balance(WALLET) == Balance(1_000_000, 3_400 + 80, 0)
            (second, *others), _ = await store.list_usage(UsageQuery(), limit=9)
            assert second == ended_5("task_2", live=False, wire="grpc", at=AT_5 + 1)
            by_id = {each.task_id: each for each in others}
            assert by_id.keys() == {"task_1", "task_3"}
            assert by_id["task_1"] == ended_5("task_1", at=AT_5)
            recovered = by_id["task_3"]
            assert (recovered.source, recovered.cost, recovered.output_tokens) == ("recovered", 80, 2)
            assert (recovered.reasoning_tokens, recovered.user, recovered.metadata) == (0, "", "")
            totals = await store.sum_usage(UsageQuery(), ("user", MetadataKey("team"), "mode"))
            assert [(total.groups, total.tasks, total.reasoning_tokens) for total in totals] == [
                (("", "", "live"), 2, 0),
                (("", "", "test"), 1, 0),
            ]


async def test_a_file_of_version_5_replays_answers_and_stores_user_and_metadata(version_5: Path) -> None:
    changes: dict[str, Any] = {"output_tokens": 9, "reasoning_tokens": 7, "user": "ada", "at": AT_5 + 9}
    new = record("task_9", metadata=encode_metadata({"team": "red"}), **changes)
    async with open_at(version_5, AT_5) as store:
        again = ReserveRequest(record("again"), 0, 0, idempotency_key=IdempotencyKey("order-1", b"f"))
        replayed = await store.reserve(again)
        assert isinstance(replayed, ReplayedAnswer)
        assert (replayed.answer, replayed.record) == (b"answer", ended_5("task_1", at=AT_5))
        await store.reserve(ReserveRequest(new, 0, 0))
        assert (await store.settle(Settlement(new))).record == new
    async with open_at(version_5, AT_5) as store:
        (newest, *_), _ = await store.list_usage(UsageQuery(), limit=9)
        assert newest == new
        totals = await store.sum_usage(UsageQuery(live=True), (MetadataKey("team"), "user"))
        assert [(total.groups, total.tasks, total.reasoning_tokens) for total in totals] == [
            (("", ""), 2, 0),
            (("red", "ada"), 1, 7),
        ]


# --- archives


@pytest.mark.parametrize("version", [0, 1, 2])
async def test_an_archive_of_an_earlier_version_is_read_and_extended(tmp_path: Path, version: int) -> None:
    path = tmp_path / "usage.db"
    with closing(sqlite3.connect(path)) as old, old:
        for statement in [each for step in ARCHIVE_MIGRATIONS[: version + 1] for each in step]:
            old.execute(statement)
        old.execute("PRAGMA application_id = 1347243073")
        old.execute(f"PRAGMA user_version = {version}")
        old.execute(
            "INSERT INTO usage VALUES ('task_0', 'r', 'acme', 1, 'k', 'grpc', 'gpt-4', 'text', 'openai', 'm', 7, 3, 0,"
            f" 0, 0, 0, 1, 1, 1, 5, 0, 'image=5', '2026-11', 'provider', 1, 10.0{', 0, 0, 0, 0' * (version > 0)}"
            + ", 0, '', ''" * (version > 1)
            + ")"
        )
    for number in (1, 2):
        async with open_archive(f"sqlite:{path}") as one, open_archive(f"sqlite:{path}") as two:
            changes = {"cached_input_tokens": 2, "provider_micros": 3, "at": 20.0 + number}
            metadata = encode_metadata({"team": "red"})
            await one.add([record(f"task_{number}", **changes, user="ada", metadata=metadata)])
            stored, _ = await two.list_usage(UsageQuery(), limit=9)
            assert [each.provider_micros for each in stored] == [3] * number + [0]
            assert [each.cached_input_tokens for each in stored] == [2] * number + [0]
            assert [each.user for each in stored] == ["ada"] * number + [""]
            totals = await two.sum_usage(UsageQuery(), (MetadataKey("team"),))
            assert [(total.groups, total.tasks) for total in totals] == [(("",), 1), (("red",), number)]
            assert await one.damage() == []
    with closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA user_version = {len(ARCHIVE_MIGRATIONS)}")
    with pytest.raises(StoreError, match="newer Pomelo"):
        async with open_archive(f"sqlite:{path}"):
            pass
