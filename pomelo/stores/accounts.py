"""The accounts role of a store: accounts, their wallets, and the credits granted to them.

An account has two wallets, one per mode (live, test). Amounts are whole microcredits, times Unix seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

DEFAULT_ACCOUNT = "default"
"""The account that every new store has."""

PAGE = 1_000
"""The default number of entries in one page of a list."""


class UnknownAccountError(LookupError):
    """No account has that name."""


@dataclass(frozen=True, slots=True)
class Wallet:
    """The credits and limits of an account in one mode."""

    account: str
    live: bool


@dataclass(frozen=True, slots=True)
class Balance:
    """A wallet's microcredits. granted = spent + held + available; none of them is negative."""

    granted: int = 0
    spent: int = 0
    held: int = 0
    """Reserved for running tasks."""

    @property
    def available(self) -> int:
        """The amount that can still be reserved."""
        return self.granted - self.spent - self.held


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits given to a wallet. `amount` is positive. A grant_id is granted only once."""

    grant_id: str
    wallet: Wallet
    amount: int
    at: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class AccountRecord:
    """An account as stored."""

    name: str
    plan: str
    created: float


@dataclass(frozen=True, slots=True)
class AccountSummary(AccountRecord):
    """An account with its balances in live and test mode."""

    live: Balance = Balance()
    test: Balance = Balance()


class AccountStore(Protocol):
    """Stores accounts and grants. Every method raises PomeloError store_unavailable if the store can't be
    reached."""

    async def add_account(self, name: str, plan: str, at: float) -> bool:
        """Creates an account. False: the name is taken."""
        ...

    async def get_account(self, name: str) -> AccountRecord | None:
        """The account with that name, or None."""
        ...

    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        """Up to `limit` accounts in order of name, starting after the name `after`."""
        ...

    async def set_plan(self, name: str, plan: str) -> bool:
        """Changes an account's plan. False: no such account."""
        ...

    async def grant(self, grant: Grant) -> Balance:
        """Gives credits, once per grant_id. Returns the balance afterwards.

        Raises:
            UnknownAccountError: the wallet's account does not exist.
        """
        ...

    async def get_grant(self, wallet: Wallet, grant_id: str) -> Grant | None:
        """The grant with that id to that wallet, or None."""
        ...

    async def list_grants(self, wallet: Wallet) -> list[Grant]:
        """A wallet's grants, oldest first."""
        ...

    async def balance(self, wallet: Wallet) -> Balance:
        """A wallet's balance; all zeros for an unknown account."""
        ...
