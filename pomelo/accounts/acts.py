"""The operator's log: acts as they are stored, and as messages."""

from __future__ import annotations

from typing import Any

from pomelo.accounts.budgets import format_budget
from pomelo.accounts.modes import to_mode
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.ids import new_id
from pomelo.money import format_credits
from pomelo.protobuf import times
from pomelo.stores.acts import Act
from pomelo.stores.keys import KeyRecord

_AMOUNTS = frozenset({"grant_credits", "adjust_credits", "set_credit_limit"})
"""Actions whose values are microcredits."""


def new_act(action: str, account: str, at: float, **values: Any) -> Act:
    """An act at Unix time `at`. The store adds the old value, if it is not in `values`."""
    return Act(new_id("act_"), at, action, account, **values)


def key_act(action: str, key: KeyRecord, at: float, *, new: str = "") -> Act:
    return new_act(action, key.account, at, key_id=key.key_id, live=key.live, new=new)


def describe_key(key: KeyRecord) -> str:
    parts = [f"name {key.name}"] if key.name else []
    parts.append(f"models {', '.join(key.models)}" if key.models else "all models")
    if key.budget:
        parts.append(f"budget {format_budget(key.budget)}")
    if key.expires is not None:
        parts.append(f"expires {times.to_timestamp(key.expires).ToJsonString()}")
    return "; ".join(parts)


def to_message(act: Act) -> pb.Act:
    message = pb.Act(
        id=act.act_id,
        time=times.to_timestamp(act.at),
        action=act.action,
        account_id=act.account,
        key_id=act.key_id,
        old_value=_value(act.action, act.old),
        new_value=_value(act.action, act.new),
        note=act.note,
    )
    if act.live is not None:
        message.mode = to_mode(act.live)
    return message


def _value(action: str, value: str) -> str:
    if action in _AMOUNTS:
        return format_credits(int(value))
    return format_budget(value) if action == "set_key_budget" else value
