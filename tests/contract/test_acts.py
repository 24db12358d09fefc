"""The operator's log, in every store."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from pomelo.stores.accounts import Grant, OverdrawnError, UnknownAccountError, Wallet
from pomelo.stores.acts import Act
from pomelo.stores.keys import KeyRecord
from tests.contract.ledger_rig import WALLET, Rig, request

KEY = KeyRecord("k1", "acme", True, b"\x00\xff", ("gpt-4",), 1_790_000_001.523456, name="wëb")


def act(act_id: str, at: float = 5.0, **values: Any) -> Act:
    return Act(act_id, at, "test", **({"account": "acme", "note": "why: ü"} | values))


async def acts(rig: Rig, account: str | None = None, **options: Any) -> list[Act]:
    """All acts, oldest first."""
    return (await rig.store.list_acts(account, limit=100, **options))[::-1]


async def test_each_change_writes_its_act_with_the_old_value(rig: Rig) -> None:
    store = rig.store
    await store.set_plan("acme", "scale", act("a1", new="scale"))
    await store.set_disabled("acme", 7.0, act("a2", new="disabled"))
    await store.grant(Grant("g", WALLET, 250, 2.0), act("a3", live=True))
    await store.grant(Grant("h", WALLET, -50, 2.0), act("a4", live=True))
    await store.set_credit_limit(WALLET, 70, act("a5", live=True, new="70"))
    await store.set_credit_limit(WALLET, 30, act("a6", live=True, new="30"))
    await store.grant(Grant("i", WALLET, 1, 2.0), act("a7", live=True))
    await store.add_key(KEY, act("a8", key_id="k1"))
    await store.set_budget("k1", "5/day", act("a9", key_id="k1", new="5/day"))
    await store.replace_key("k1", replace(KEY, key_id="k2"), 9.0, act("b1", key_id="k1", new="k2"))
    await store.revoke_key("k2", 9.5, act("b2", key_id="k2"))
    await store.add_account("bee", "pro", 1.0, act("b3", account="bee", new="pro"))
    found = await acts(rig)
    assert [(each.act_id, each.old, each.new) for each in found] == [
        ("a1", "pro", "scale"),
        ("a2", "", "disabled"),
        ("a3", "1000", "1250"),
        ("a4", "1250", "1200"),
        ("a5", "0", "70"),
        ("a6", "70", "30"),
        ("a7", "1200", "1201"),
        ("a8", "", ""),
        ("a9", "", "5/day"),
        ("b1", "", "k2"),
        ("b2", "", ""),
        ("b3", "", "pro"),
    ]
    assert found[2] == act("a3", live=True, old="1000", new="1250")
    assert found[8] == act("a9", key_id="k1", old="", new="5/day")


async def test_a_grant_and_its_act_have_exactly_the_same_time(rig: Rig) -> None:
    at = 1_790_000_001.5234567
    await rig.store.grant(Grant("g", WALLET, 5, at), act("a1", at, live=True))
    assert (await rig.store.list_grants(WALLET))[-1].at == at
    assert [each.at for each in await acts(rig, "acme", since=at)] == [at]


async def test_what_changes_nothing_writes_no_act(rig: Rig) -> None:
    store = rig.store
    await store.add_key(KEY)
    await store.revoke_key("k1", 9.0)
    await store.reserve(request("a", 1_000))
    assert not await store.add_account("acme", "pro", 1.0, act("a"))
    assert await store.set_plan("acme", "pro", act("b"))
    assert not await store.set_plan("nobody", "pro", act("c"))
    assert await store.set_disabled("acme", None, act("d"))
    assert not await store.set_disabled("nobody", 1.0, act("e"))
    await store.grant(Grant("first", WALLET, 1_000, 1.0), act("f"))
    with pytest.raises(OverdrawnError):
        await store.grant(Grant("back", WALLET, -1, 1.0), act("g"))
    with pytest.raises(UnknownAccountError):
        await store.grant(Grant("gift", Wallet("nobody", True), 1, 1.0), act("h"))
    await store.set_credit_limit(WALLET, 0, act("i"))
    await store.revoke_key("k1", 10.0, act("j"))
    assert not await store.replace_key("k1", replace(KEY, key_id="k2"), 10.0, act("k"))
    assert await store.set_budget("k1", "", act("l"))
    assert not await store.set_budget("nothing", "5/day", act("m"))
    assert await acts(rig) == []


async def test_acts_are_listed_newest_first_by_account_and_time_in_pages(rig: Rig) -> None:
    await rig.store.add_account("bee", "pro", 1.0)
    for number in range(9):
        name = "bee" if number % 3 == 0 else "acme"
        given = Grant(f"g{number}", Wallet(name, number % 2 == 0), 1, 1.0)
        await rig.store.grant(given, act(f"a{number}", float(number // 2), account=name))
    assert [each.act_id for each in await acts(rig, "bee")] == ["a0", "a3", "a6"]
    assert [each.act_id for each in await acts(rig, since=3.0)] == ["a6", "a7", "a8"]
    assert await acts(rig, "nobody") == []
    pages, after = [], None
    while page := await rig.store.list_acts(limit=4, after=after):
        pages.append("".join(each.act_id[1:] for each in page))
        after = page[-1].at, page[-1].act_id
    assert pages == ["8765", "4321", "0"]


async def test_acts_survive_a_crash(rig: Rig) -> None:
    await rig.store.set_plan("acme", "scale", act("a", new="scale"))
    before = await acts(rig)
    await rig.store.grant(Grant("g", WALLET, 1, 1.0), act("b"))
    await rig.crash()
    found = await acts(rig)
    assert found[0] == before[0]
    assert [each.act_id for each in found] == ["a", "b"]


async def test_a_key_keeps_its_name_budget_and_last_use(rig: Rig) -> None:
    store = rig.store
    key = replace(KEY, budget="5/day", origin="k0")
    await store.add_key(key)
    assert await store.get_key("k1") == key
    await store.record_key_use({"k1": 1_800_000_000.0, "gone": 1.0})
    used = replace(key, used=1_800_000_000.0)
    assert await store.get_key("k1") == used
    assert await store.set_budget("k1", "")
    assert await store.list_keys("acme") == [replace(used, budget="")]


async def test_a_replaced_key_may_work_until_it_expires(rig: Rig) -> None:
    await rig.store.add_key(KEY)
    successor = replace(KEY, key_id="k2", created=1_790_000_009.25)
    for _ in range(2):
        with suppress(Exception):  # the second time, SQLite refuses the id of the successor
            assert await rig.store.replace_key("k1", successor, 9.0, expires=1_790_000_010.123456)
    old = replace(KEY, expires=1_790_000_010.123456, successor="k2")
    assert await rig.store.list_keys("acme") == [old, successor]
    assert not await rig.store.replace_key("nothing", successor, 9.0, expires=1.0)


async def test_an_account_is_disabled_and_enabled(rig: Rig) -> None:
    store = rig.store
    for disabled in (7.5, 8.5):  # it keeps the first time
        assert await store.set_disabled("acme", disabled)
        found = await store.get_account("acme")
        assert found is not None
        assert found.disabled == 7.5
    assert [one.disabled for one in await store.list_accounts(limit=1)] == [7.5]
    assert await store.set_disabled("acme", None)
    assert [one.disabled for one in await store.list_accounts(limit=1)] == [None]
