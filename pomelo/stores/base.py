"""The roles that a store plays, and the records that it keeps.

Who needs one role asks for that role; a store plays all of them, which the contract tests hold it to. No
role knows how a key is checked or a task is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pomelo.errors import PomeloError
from pomelo.stores.ledger import PAGE, AccountStore, LedgerStore, LostReservationError, UsageStore

DEFAULT_ACCOUNT = "default"
"""The account that every new store has."""


class StoreError(Exception):
    """The store can't be opened; the message is one line that says what to do. Never seen by callers."""


class UnknownAccountError(LookupError):
    """There is no account of that name."""


DECLARED_ERRORS = (PomeloError, LostReservationError, UnknownAccountError)
"""The errors that the roles below declare; a store turns all others into these."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is kept: `digest` stands for its secret. Times are Unix seconds; no `models` means all."""

    key_id: str
    account: str
    live: bool
    digest: bytes
    models: tuple[str, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None


class KeyStore(Protocol):
    """Keeps keys. Every method raises PomeloError store_unavailable when the store can't be reached."""

    async def get_key(self, key_id: str) -> KeyRecord | None:
        """The key of that id, revoked and expired ones too."""
        ...

    async def add_key(self, record: KeyRecord) -> None:
        """Keeps a new key.

        Raises:
            UnknownAccountError: `record.account` is none.
        """
        ...

    async def list_keys(
        self, account: str | None = None, *, limit: int = PAGE, after: tuple[float, str] | None = None
    ) -> list[KeyRecord]:
        """At most `limit` keys of one account, or of all; oldest first, equal times by id. The list
        begins after the key with the time and id `after`."""
        ...

    async def revoke_key(self, key_id: str, at: float) -> KeyRecord | None:
        """Marks a key as revoked, for good; the first time stands. None: there is no such key."""
        ...

    async def replace_key(self, key_id: str, successor: KeyRecord, at: float) -> bool:
        """Keeps `successor` and revokes the key, both or neither. False: no such key that isn't revoked."""
        ...


class Store(KeyStore, AccountStore, LedgerStore, UsageStore, Protocol):
    """All roles."""
