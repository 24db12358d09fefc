"""The rules of the ledger's state machine that the operator causes: corrections, credit limits, new periods."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from pomelo.stores.accounts import Grant, OverdrawnError, Wallet
from pomelo.stores.base import Store
from tests.contract.ledger_model import WALLETS, WalletModel

T = TypeVar("T")


class OperatorRules(RuleBasedStateMachine):
    """What the operator does, compared with the model."""

    wallets: dict[Wallet, WalletModel]
    grants: dict[str, Grant]
    period = 0.0
    """When the current period of all budgets began."""

    def do(self, call: Awaitable[T]) -> T:
        raise NotImplementedError

    def count(self) -> None:
        raise NotImplementedError

    def state_of(self, wallet: Wallet) -> WalletModel:
        raise NotImplementedError

    @property
    def store(self) -> Store:
        raise NotImplementedError

    @rule(wallet=st.sampled_from(WALLETS), amount=st.integers(1, 200), again=st.integers(0, 9))
    def grant(self, wallet: Wallet, amount: int, again: int) -> None:
        self.count()
        grant_id = f"g{len(self.grants) if again > 2 else again}"
        given = Grant(grant_id, wallet, amount, float(len(self.grants)))
        if grant_id not in self.grants:
            self.grants[grant_id] = given
            self.wallets[wallet].granted += amount
            self.wallets[wallet].touched = True
        state = self.state_of(wallet)
        assert self.do(self.store.grant(given)) == state.balance

    @rule(
        wallet=st.sampled_from(WALLETS),
        amount=st.integers(-300, 100).filter(bool),
        again=st.sampled_from([False, False, True]),
    )
    def adjust(self, wallet: Wallet, amount: int, again: bool) -> None:
        self.count()
        grant_id = f"g{len(self.grants)}"
        if again:
            grant_id = next(reversed(self.grants))
        adjustment = Grant(grant_id, wallet, amount, float(len(self.grants)), "by hand")
        state = self.state_of(wallet)
        if grant_id not in self.grants and state.balance.available + amount < 0:
            with pytest.raises(OverdrawnError):
                self.do(self.store.grant(adjustment))
        else:
            if grant_id not in self.grants:
                self.grants[grant_id] = adjustment
                state.granted += amount
                state.touched = True
            assert self.do(self.store.grant(adjustment)) == state.balance

    @rule(wallet=st.sampled_from(WALLETS), limit=st.sampled_from([0, 0, 50, 200, 500]))
    def lend(self, wallet: Wallet, limit: int) -> None:
        self.count()
        state = self.state_of(wallet)
        if state.balance.available + limit - state.credit_limit < 0:
            with pytest.raises(OverdrawnError):
                self.do(self.store.set_credit_limit(wallet, limit))
        else:
            state.touched = state.touched or limit != state.credit_limit
            state.credit_limit = limit
            assert self.do(self.store.set_credit_limit(wallet, limit)) == state.balance

    @rule(begins=st.sampled_from([False, False, True]))
    def begin_period(self, begins: bool) -> None:
        if begins:
            self.count()
            self.period += 86_400.0
