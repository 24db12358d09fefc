"""Tasks in test mode of the default account, whose wallet every new store has."""

from __future__ import annotations

from typing import Any

from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import ReserveRequest, Settlement
from tests.contract.ledger_rig import record, request

WALLET = Wallet("default", False)


def own_request(task_id: str, **changes: Any) -> ReserveRequest:
    return request(task_id, account="default", live=False, **changes)


def own_settlement(task_id: str, cost: int = 3) -> Settlement:
    return Settlement(record(task_id, account="default", live=False, cost=cost))
