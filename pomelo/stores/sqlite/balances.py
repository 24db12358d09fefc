"""The balances of wallets: what the file has, with what running tasks reserve, and the operator's changes."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from pomelo.runtime.process import fail, resolve
from pomelo.stores.accounts import AccountSummary, Balance, Grant, OverdrawnError, Wallet
from pomelo.stores.acts import Act
from pomelo.stores.sqlite import accounts
from pomelo.stores.sqlite.ledger import Ledger
from pomelo.stores.sqlite.wallets import LoadedWallet
from pomelo.stores.sqlite.writer import Writer, nothing


class Balances:
    """The balances of the wallets of a `ledger`. Use it in the writer's event loop only."""

    def __init__(self, writer: Writer, ledger: Ledger) -> None:
        self._writer = writer
        self._ledger = ledger

    async def get(self, wallet: Wallet) -> Balance:
        read = partial(accounts.balance, wallet=wallet)
        return await self._writer.do_then(read, partial(self._ledger.add_held, wallet), reads=True)

    def of_account(self, summary: AccountSummary) -> AccountSummary:
        """An account in the file, with what running tasks reserve."""
        live = self._ledger.add_held(Wallet(summary.name, True), summary.live)
        test = self._ledger.add_held(Wallet(summary.name, False), summary.test)
        return replace(summary, live=live, test=test)

    async def grant(self, grant: Grant, act: Act | None = None) -> Balance:
        """Gives credits or takes them back."""
        write = partial(accounts.add_grant, grant=grant, act=act)
        return await self._change(grant.wallet, lambda wallet: -grant.amount, write)

    async def set_credit_limit(self, wallet: Wallet, credit_limit: int, act: Act | None = None) -> Balance:
        write = partial(accounts.set_credit_limit, wallet=wallet, credit_limit=credit_limit, act=act)
        return await self._change(wallet, lambda loaded: loaded.credit_limit - credit_limit, write)

    def _change(
        self,
        wallet: Wallet,
        reduction: Callable[[LoadedWallet], int],
        write: Callable[[sqlite3.Connection, bool], Balance | None],
    ) -> Awaitable[Balance]:
        """Writes a change of what a wallet may spend, after its earlier changes. A reduction is taken from
        the available credits first, so that no task can reserve it meanwhile. `write` receives whether it was
        available, and returns None if it must be.

        Raises:
            OverdrawnError: it is not available.
        """

        def begin(loaded: LoadedWallet, future: asyncio.Future[Any]) -> None:
            loaded.deciding += 1
            # A task that is ending may release what is needed.
            decide(loaded, future, wait=loaded.ending > 0)

        def decide(loaded: LoadedWallet, future: asyncio.Future[Any], *, wait: bool = False) -> None:
            if wait or loaded.changing:
                self._writer.queue(nothing, lambda *_: decide(loaded, future), reads=True)
                return
            taken = max(0, reduction(loaded))
            covered = taken <= loaded.available
            if not covered:
                taken = 0
            loaded.changing = True
            loaded.withdrawing = taken
            loaded.granted -= taken

            def done(balance: Balance | None, error: Exception | None) -> None:
                loaded.deciding -= 1
                loaded.changing = False
                loaded.withdrawing = 0
                loaded.granted += taken
                if error is not None:
                    fail(future, error)
                elif balance is None:
                    fail(future, OverdrawnError(wallet.account))
                else:
                    loaded.granted = balance.granted + balance.credit_limit
                    loaded.credit_limit = balance.credit_limit
                    resolve(future, self._ledger.add_held(wallet, balance))

            self._writer.queue(lambda connection: write(connection, covered), done, reads=False)

        return self._ledger.with_wallet(wallet.account, wallet.live, begin)
