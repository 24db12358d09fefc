"""The accounts role of a store: accounts, their wallets, and the credits that they may spend.

A method that changes something writes its `act` to the operator's log in the same step, with the old value.
An account has two wallets, one per mode (live, test). Amounts are whole microcredits, times Unix seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pomelo.stores.acts import Act

DEFAULT_ACCOUNT = "default"
"""The account that every new store has."""

PAGE = 1_000
"""The default number of entries in one page of a list."""


class UnknownAccountError(LookupError):
    """No account has that name."""


class OverdrawnError(Exception):
    """A change would leave less than nothing available; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Wallet:
    """The credits and limits of an account in one mode."""

    account: str
    live: bool


@dataclass(frozen=True, slots=True)
class Balance:
    """A wallet's microcredits. granted + credit_limit = spent + held + available. Only `granted` may be
    negative, if the wallet has a credit limit."""

    granted: int = 0
    spent: int = 0
    held: int = 0
    """Reserved for running tasks."""
    credit_limit: int = 0
    """What a postpaid wallet may spend beyond what was granted."""

    @property
    def available(self) -> int:
        """The amount that can still be reserved."""
        return self.granted + self.credit_limit - self.spent - self.held


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits given to a wallet, or taken back if `amount` is negative. A grant_id is granted only once."""

    grant_id: str
    wallet: Wallet
    amount: int
    at: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class AccountRecord:
    """An account as stored. `disabled` is when it was disabled, None if its keys work."""

    name: str
    plan: str
    created: float
    disabled: float | None = None


@dataclass(frozen=True, slots=True)
class AccountSummary(AccountRecord):
    """An account with its balances in live and test mode."""

    live: Balance = Balance()
    test: Balance = Balance()


class AccountStore(Protocol):
    """Stores accounts and grants. Every method raises PomeloError store_unavailable if the store can't be
    reached."""

    async def add_account(self, name: str, plan: str, at: float, act: Act | None = None) -> bool:
        """Creates an account. False: the name is taken."""
        ...

    async def get_account(self, name: str) -> AccountRecord | None:
        """The account with that name, or None."""
        ...

    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        """Up to `limit` accounts in order of name, starting after the name `after`."""
        ...

    async def set_plan(self, name: str, plan: str, act: Act | None = None) -> bool:
        """Changes an account's plan. False: no such account."""
        ...

    async def set_disabled(self, name: str, disabled: float | None, act: Act | None = None) -> bool:
        """Disables an account, or enables it (None). One that is disabled keeps the time. False: no such
        account."""
        ...

    async def grant(self, grant: Grant, act: Act | None = None) -> Balance:
        """Gives credits or takes them back, once per grant_id. Returns the balance afterwards.

        Raises:
            UnknownAccountError: the wallet's account does not exist.
            OverdrawnError: less than the amount to take back is available.
        """
        ...

    async def set_credit_limit(self, wallet: Wallet, credit_limit: int, act: Act | None = None) -> Balance:
        """Sets how much the wallet may spend beyond what was granted. Returns the balance afterwards.

        Raises:
            UnknownAccountError: the wallet's account does not exist.
            OverdrawnError: less than the reduction is available.
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
