"""A store: one object that plays all roles."""

from __future__ import annotations

from typing import Protocol

from pomelo.errors import PomeloError
from pomelo.stores.accounts import AccountStore, OverdrawnError, UnknownAccountError
from pomelo.stores.acts import ActStore
from pomelo.stores.keys import KeyStore
from pomelo.stores.ledger import LedgerStore, LostReservationError
from pomelo.stores.usage import UsageStore


class StoreError(Exception):
    """A store can't be opened. The message is one line that says what the operator must do."""


DECLARED_ERRORS = (PomeloError, LostReservationError, UnknownAccountError, OverdrawnError)
"""The errors that the roles declare. A store translates all others to store_unavailable."""


class Store(KeyStore, AccountStore, ActStore, LedgerStore, UsageStore, Protocol):
    """Keys, accounts, the operator's log, ledger and usage records. No role knows how a key is checked or a
    task is run."""

    async def check(self) -> None:
        """Checks that the store can be read, and, if the last attempt to write failed, that it can be written
        again.

        Raises:
            PomeloError: store_unavailable.
        """
        ...
