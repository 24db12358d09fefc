"""The records of tasks that failed, in every store and archive, and in files of the version before them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pomelo.accounts.audit import audit
from pomelo.stores.accounts import Balance
from pomelo.stores.archive.base import Archive
from pomelo.stores.base import Store
from pomelo.stores.ledger import IdempotencyKey, ReplayedAnswer, Reserved, ReserveRequest, Settlement
from pomelo.stores.records import decode_record, encode_record
from pomelo.stores.usage import CANCELLED, UsageQuery, UsageRecord
from tests.contract.earlier_files import left_by, open_at
from tests.contract.ledger_rig import KEY, WALLET, Rig, balance, record, request, run_task
from tests.limits import counters, limits

BILLED, FAILED = UsageQuery(), UsageQuery(failed=True)


def failure(task_id: str, code: str = "provider_failed", cost: int = 0) -> UsageRecord:
    """The record of a task that failed."""
    values = {"provider": "openai", "provider_model": "m", "source": "estimated", "complete": False}
    return record(task_id, code=code, cost=cost, **values)


async def ids(source: Store | Archive, query: UsageQuery) -> str:
    """The ids of the records that a query selects."""
    return "".join([each.task_id for each in (await source.list_usage(query, limit=9, after=""))[0]])


async def test_a_failed_task_leaves_one_record_that_is_not_billed(rig: Rig) -> None:
    await run_task(rig.store, "a", 10, images=2, prices="image=5")
    await rig.store.reserve(request("b", 300, tokens=40, concurrency_limit=2, idempotency_key=KEY))
    ended = Settlement(failure("b"), counters(tokens=40))
    for _ in range(2):  # the second call changes nothing
        assert (await rig.store.settle(ended)).record == failure("b")
    assert await balance(rig) == (10, 0, 990)
    used = await limits(rig.store, WALLET)
    assert (used.requests, used.concurrency, used.tokens) == (2, 0, 40)
    assert isinstance(await rig.store.reserve(request("c", idempotency_key=KEY)), Reserved)
    await rig.store.void(WALLET, "c")
    await rig.crash()
    assert await ids(rig.store, BILLED) == "a"
    assert (await rig.store.list_usage(FAILED, limit=9))[0] == [failure("b")]
    assert [total.tasks for total in await rig.store.sum_usage(BILLED, ())] == [1]
    assert not (await audit(rig.store)).findings


async def test_a_failed_task_that_was_billed_in_part_is_listed_as_both(rig: Rig) -> None:
    for task_id, cost in (("a", 0), ("b", 5)):
        await rig.store.reserve(request(task_id))
        await rig.store.settle(Settlement(failure(task_id, CANCELLED, cost)))
    assert await ids(rig.store, BILLED) == "b"
    assert sorted(await ids(rig.store, FAILED)) == ["a", "b"]
    assert await balance(rig) == (5, 0, 995)


async def test_a_task_that_may_have_failed_before_is_not_settled_again(rig: Rig) -> None:
    await rig.store.reserve(request("a"))
    await rig.store.settle(Settlement(failure("a")))
    assert (await rig.store.settle(Settlement(record("a", cost=10)))).record == failure("a")
    assert await balance(rig) == (0, 0, 1_000)


async def test_archives_tell_failed_tasks_from_billed_ones(archive: Archive) -> None:
    uncollected = replace(failure("d"), uncollected=7)
    free = record("e")
    tasks = [record("a", cost=1), failure("b"), failure("c", CANCELLED, 9), uncollected, free]
    await archive.add(tasks)
    assert await ids(archive, BILLED) == "edca"
    assert await ids(archive, FAILED) == "dcb"
    by_code = await archive.sum_usage(FAILED, ("code", "provider"))
    assert [(*total.groups, total.tasks, total.cost) for total in by_code] == [
        ("cancelled", "openai", 1, 9),
        ("provider_failed", "openai", 2, 0),
    ]
    assert [total.tasks for total in await archive.sum_usage(BILLED, ())] == [4]


def test_the_json_of_a_task_that_did_not_fail_is_that_of_the_version_before() -> None:
    assert b'"code"' not in encode_record(record("a"))
    for each in (record("a"), failure("b")):
        assert decode_record(encode_record(each)) == each


AT_6 = 1_795_700_000.25
"""When version 6 ended: two tasks of acme have ended, and one runs."""


async def test_a_file_of_the_version_before_is_opened_and_keeps_failed_tasks(tmp_path: Path) -> None:
    path = left_by(6, tmp_path)
    async with open_at(path, AT_6) as store:
        assert await store.balance(WALLET) == Balance(1_000_000, 2 * 540 + 80, 0)
        again = ReserveRequest(record("again"), 0, 0, idempotency_key=IdempotencyKey("order-1", b"f"))
        assert isinstance(await store.reserve(again), ReplayedAnswer)
        stored, _ = await store.list_usage(BILLED, limit=9)
        assert sorted((each.task_id, each.complete, each.code) for each in stored) == [
            ("task_1", True, ""),
            ("task_2", False, ""),
            ("task_3", False, ""),
        ]
        assert await ids(store, FAILED) == ""
        await store.reserve(ReserveRequest(record("new"), 0, 9))
        await store.settle(Settlement(failure("new")))
    async with open_at(path, AT_6) as store:
        assert (await store.list_usage(FAILED, limit=9))[0] == [failure("new")]
        assert not (await audit(store)).findings
