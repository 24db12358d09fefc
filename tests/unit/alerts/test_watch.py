"""What is reported of a real store, search by search."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from pomelo.accounts.accounts import AccountOperator
from pomelo.accounts.plans import BUILTIN
from pomelo.alerts.alert import Alert
from pomelo.alerts.watch import Watch, open_watch
from pomelo.errors import PomeloError
from pomelo.gen.admin.v1 import admin_service_pb2 as admin_pb
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import Store
from tests.alerts import open_receiver
from tests.unit.accounts.audited_store import ACME, add_account, reserve, run
from tests.unit.clock import Clock
from tests.waiting import until

UNAVAILABLE = PomeloError("store_unavailable")


def noting(
    noted: dict[str, str], *, before: Iterable[BaseException] = (), after: Iterable[BaseException] = ()
) -> Callable[[str, str, float], Awaitable[bool]]:
    """Returns a function that notes states in `noted` and returns whether they are new. Its first calls raise
    the exceptions of `before`, without a note; those with news then raise those of `after`, having noted it."""
    earlier, later = list(before), list(after)

    async def note_state(subject: str, state: str, seconds: float) -> bool:
        if earlier:
            raise earlier.pop()
        changed = noted.get(subject) != state
        noted[subject] = state
        if changed and later:
            raise later.pop()
        return changed

    return note_state


async def test_a_low_balance_is_reported_after_an_outage_and_again_only_after_another_grant(
    store: Store,
    sent: list[Alert],
) -> None:
    noted: dict[str, str] = {}
    note_state = noting(noted, before=[UNAVAILABLE])
    await add_account(store, micros=900)
    watch = Watch(store, sent.append, low_share=0.2, blocked_routes=set, note_state=note_state)
    watch.charged(await run(store, "a", output_tokens=50))  # 750 microcredits
    with pytest.raises(PomeloError):
        await watch.search()
    assert not sent
    await watch.search()
    assert [(alert.type, alert.data["available_micros"]) for alert in sent] == [("balance.low", 150)]
    noted.clear()  # only the next charged task is looked at
    await watch.search()
    assert len(sent) == 1
    watch = Watch(store, sent.append, low_share=0.2, blocked_routes=set)
    watch.charged(await run(store, "free", input_tokens=0, output_tokens=0))
    await watch.search()
    assert sent[1].id == sent[0].id  # after a restart, the receiver recognises it
    await store.grant(Grant("second", ACME, 1_000, 2.0))
    watch.charged(await run(store, "b", output_tokens=50))
    await watch.search()
    assert len(sent) == 2  # 400 are left, more than a fifth of the last grant
    await store.set_credit_limit(ACME, 10_000)
    watch.charged(await run(store, "c", output_tokens=50))
    await watch.search()
    assert len(sent) == 2
    await store.set_credit_limit(ACME, 400)
    watch.charged(await run(store, "d", input_tokens=0, output_tokens=0))
    await watch.search()
    assert [alert.data["threshold_micros"] for alert in sent] == [180, 180, 280]
    assert sent[2].id != sent[1].id
    await store.set_credit_limit(ACME, 401)
    watch.charged(await run(store, "e", input_tokens=0, output_tokens=0))
    await watch.search()
    assert sent[3].id != sent[2].id  # another limit is news as another grant is


async def test_an_alert_is_reported_if_the_store_noted_it_without_an_answer(
    store: Store, sent: list[Alert]
) -> None:
    note_state = noting({}, after=[UNAVAILABLE] * 2)
    blocked: set[tuple[str, ...]] = {("openai", "gpt-4o")}
    await add_account(store, micros=900)
    watch = Watch(store, sent.append, low_share=0.2, blocked_routes=lambda: blocked, note_state=note_state)
    watch.charged(await run(store, "a", output_tokens=50))
    for _ in range(2):
        with pytest.raises(PomeloError):
            await watch.search()
    for _ in range(2):
        await watch.search()
    assert [alert.type for alert in sent] == ["provider.open", "balance.low"]
    watch.charged(await run(store, "b", input_tokens=0, output_tokens=0))
    await watch.search()
    assert len(sent) == 2


async def test_an_alert_that_the_store_could_not_note_is_reported_once(
    store: Store, sent: list[Alert]
) -> None:
    await add_account(store, micros=900)
    watch = Watch(
        store, sent.append, low_share=0.2, blocked_routes=set, note_state=noting({}, before=[UNAVAILABLE])
    )
    watch.charged(await run(store, "a", output_tokens=50))
    with pytest.raises(PomeloError):
        await watch.search()
    for task_id in ("b", "c"):
        watch.charged(await run(store, task_id, input_tokens=0, output_tokens=0))
        await watch.search()
    assert [alert.type for alert in sent] == ["balance.low"]


async def test_an_alert_whose_search_is_cancelled_after_its_state_was_noted_is_reported(
    store: Store, sent: list[Alert]
) -> None:
    note_state = noting({}, after=[asyncio.CancelledError()])
    await add_account(store, micros=900)
    watch = Watch(store, sent.append, low_share=0.2, blocked_routes=set, note_state=note_state)
    watch.charged(await run(store, "a", output_tokens=50))
    with pytest.raises(asyncio.CancelledError):
        await watch.search()
    for _ in range(2):
        await watch.search()
    assert [alert.type for alert in sent] == ["balance.low"]


async def test_what_happened_just_before_the_end_is_reported(store: Store) -> None:
    async with open_receiver([b"k"]) as receiver:
        await add_account(store, micros=900)
        async with open_watch(
            [receiver.url], [b"k"], 3_600.0, store, low_share=0.2, blocked_routes=set
        ) as watch:
            watch.charged(await run(store, "a", output_tokens=50))
        assert [alert["type"] for alert in receiver.received] == ["balance.low"]


async def test_what_happens_is_reported_while_the_process_runs(store: Store) -> None:
    async with open_receiver([b"k"]) as receiver:
        await add_account(store, micros=900)
        async with open_watch(
            [receiver.url], [b"k"], 0.01, store, low_share=0.2, blocked_routes=set
        ) as watch:
            watch.charged(await run(store, "a", output_tokens=50))
            await until(lambda: bool(receiver.received))


async def test_a_store_that_does_not_answer_does_not_delay_the_end_for_long(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.alerts.watch._LAST_SEARCH", 0.05)
    asked: list[str] = []

    async def note_state(subject: str, state: str, seconds: float) -> bool:
        asked.append(subject)
        await asyncio.Event().wait()
        return True

    options: dict[str, Any] = {"low_share": 0.2, "blocked_routes": lambda: {("openai", "gpt-4o")}}
    async with asyncio.timeout(20), open_watch([], [], 3_600.0, store, note_state=note_state, **options):
        pass
    assert asked == ["circuit openai gpt-4o"]


async def test_a_balance_is_low_by_the_last_amount_that_was_granted(store: Store, sent: list[Alert]) -> None:
    await add_account(store, micros=900)
    watch = Watch(store, sent.append, low_share=1.0, blocked_routes=set)
    for number, micros in enumerate((1, -140)):
        await store.grant(Grant(f"g{number}", ACME, micros, 2.0))
    watch.charged(await run(store, "a", output_tokens=50))  # 750 of 761 microcredits
    await watch.search()
    assert sent == []
    watch.charged(await run(store, "b", input_tokens=4, output_tokens=0))
    await watch.search()
    assert sent == []  # what was granted last is left
    await store.grant(Grant("last", ACME, 20, 3.0))
    await store.grant(Grant("taken back", ACME, -1, 4.0))
    watch.charged(await run(store, "c", input_tokens=4, output_tokens=0))
    await watch.search()
    assert [alert.data["threshold_micros"] for alert in sent] == [20]


async def test_a_correction_changes_neither_the_threshold_nor_when_the_next_alert_is_due(
    store: Store, sent: list[Alert], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.alerts.watch.PAGE", 2)
    clock = Clock()
    operator = AccountOperator(store, BUILTIN, lambda name: None, clock)

    async def give(amount: int, action: str, **values: Any) -> None:
        clock.now += 0.1
        if action == "grant":
            request = admin_pb.GrantCreditsRequest(account_id="acme", amount_micros=amount, **values)
            await operator.grant_credits(request)
        else:
            change = admin_pb.AdjustCreditsRequest(
                account_id="acme", amount_micros=amount, note="a note", **values
            )
            await operator.adjust_credits(change)

    async def search(task: str, **usage: Any) -> list[tuple[int, int]]:
        watch.charged(await run(store, task, **usage))
        await watch.search()
        return [(alert.data["threshold_micros"], alert.data["available_micros"]) for alert in sent]

    await add_account(store, micros=1)
    watch = Watch(store, sent.append, low_share=0.5, blocked_routes=set)
    await give(800, "grant")
    for number in range(5):
        await give(1, "adjust", adjustment_id=f"own-{number}" if number else "")
    await give(-3, "adjust")
    for amount in (800, -800):  # as much as the grant, and later
        await give(amount, "adjust")
    assert await search("a", output_tokens=20, input_tokens=0) == []  # 603 are left
    assert await search("b", output_tokens=25, input_tokens=0) == [(400, 353)]
    await give(5, "adjust")
    assert await search("c", output_tokens=0, input_tokens=0) == [(400, 353)]
    await give(5, "grant")  # as much as the correction
    assert await search("d", output_tokens=36, input_tokens=0) == [
        (400, 353)
    ]  # 3 are left, more than half of 5
    assert await search("e", output_tokens=0, input_tokens=1) == [(400, 353), (2, 0)]


async def test_a_large_correction_is_no_grant_and_a_grant_beside_one_is(
    store: Store, sent: list[Alert]
) -> None:
    clock = Clock()
    operator = AccountOperator(store, BUILTIN, lambda name: None, clock)

    async def adjust(amount: int, mode: Mode.ValueType = Mode.MODE_LIVE) -> None:
        change = admin_pb.AdjustCreditsRequest(
            account_id="acme", amount_micros=amount, note="a note", mode=mode
        )
        await operator.adjust_credits(change)

    await add_account(store, micros=800)
    watch = Watch(store, sent.append, low_share=0.5, blocked_routes=set)
    clock.now += 0.1
    await adjust(2_000)
    watch.charged(await run(store, "a", output_tokens=200, input_tokens=0))  # 800 are left
    await watch.search()
    assert sent == []
    # A grant at the time of a correction of another amount, and of one in the other mode, is a grant.
    clock.now += 0.1
    await adjust(1)
    await adjust(5_000, Mode.MODE_TEST)
    await store.grant(Grant("beside", ACME, 5_000, clock()))
    watch.charged(await run(store, "b", output_tokens=400, input_tokens=0))
    await watch.search()
    assert [alert.data["threshold_micros"] for alert in sent] == [2_500]


async def test_credits_that_running_tasks_have_reserved_are_left(store: Store, sent: list[Alert]) -> None:
    await add_account(store, micros=1_000)
    watch = Watch(store, sent.append, low_share=0.5, blocked_routes=set)
    await reserve(store, "running", maximum=500)
    for task in "abc":
        watch.charged(await run(store, task, input_tokens=64, output_tokens=0))
    await watch.search()
    assert sent == []
    await store.void(ACME, "running")
    await reserve(store, "still running", maximum=100)
    watch.charged(await run(store, "d", input_tokens=64, output_tokens=0))
    await watch.search()
    assert [(alert.data["available_micros"], alert.data["held_micros"]) for alert in sent] == [(260, 100)]


async def test_all_accounts_are_looked_at_and_a_second_outage_of_a_route_is_another_alert(
    store: Store, sent: list[Alert]
) -> None:
    clock = Clock()
    blocked: set[tuple[str, ...]] = set()
    watch = Watch(store, sent.append, low_share=0.5, blocked_routes=lambda: blocked, now=clock)
    await add_account(store, micros=900)
    other = Wallet("other", live=True)
    await store.add_account("other", "pro", 1.0)
    await store.grant(Grant("other", other, 900, 1.0))
    for wallet in (ACME, other):
        watch.charged(await run(store, f"of {wallet.account}", wallet, output_tokens=50))
    await watch.search()
    assert sorted(alert.data["account"] for alert in sent) == ["acme", "other"]
    sent.clear()
    for routes in ([("openai", "a")], [], [("openai", "a")]):
        blocked = set(routes)
        clock.now += 1
        await watch.search()
    assert [alert.type for alert in sent] == ["provider.open", "provider.closed", "provider.open"]
    assert len({alert.id for alert in sent}) == 3
