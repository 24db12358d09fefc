"""The keys role of a store: API keys, by id.

A method that changes something writes its `act` to the operator's log in the same step, with the old value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pomelo.stores.accounts import PAGE
from pomelo.stores.acts import Act


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as stored, with a digest in place of its secret. Times are Unix seconds. Empty `models` allows
    all models.

    `used` is about when it was used last. `budget` is its budget as text, empty without one; it is counted
    under the id `origin`, that of the first key of those that replaced each other (empty: its own).
    `successor` is the id of the key that replaced one that still works.
    """

    key_id: str
    account: str
    live: bool
    digest: bytes
    models: tuple[str, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None
    name: str = ""
    budget: str = ""
    origin: str = ""
    successor: str = ""
    used: float | None = None


class KeyStore(Protocol):
    """Stores API keys. Every method raises PomeloError store_unavailable if the store can't be reached."""

    async def get_key(self, key_id: str) -> KeyRecord | None:
        """The key with that id, even if it is revoked or expired, or None."""
        ...

    async def add_key(self, record: KeyRecord, act: Act | None = None) -> None:
        """Stores a new key.

        Raises:
            UnknownAccountError: `record.account` does not exist.
        """
        ...

    async def list_keys(
        self, account: str | None = None, *, limit: int = PAGE, after: tuple[float, str] | None = None
    ) -> list[KeyRecord]:
        """Up to `limit` keys of one account, or of all, oldest first and then by id. The list starts after
        the key with the time and id `after`."""
        ...

    async def revoke_key(self, key_id: str, at: float, act: Act | None = None) -> KeyRecord | None:
        """Revokes a key for good. Revoking it again keeps the first time. None: no such key."""
        ...

    async def rehash_key(self, key_id: str, old: bytes, new: bytes, secret_id: str) -> None:
        """Replaces the digest `old` of a key by `new`, and notes the id of the secret that made `new`.
        Does nothing if the key has another digest. Idempotent."""
        ...

    async def keys_of_secret(self, secret_id: str, key_ids: Sequence[str]) -> set[str]:
        """Those of the keys whose digest was noted to be made with that secret."""
        ...

    async def set_budget(self, key_id: str, budget: str, act: Act | None = None) -> bool:
        """Changes the budget of a key. False: no such key."""
        ...

    async def record_key_use(self, used: Mapping[str, float]) -> None:
        """Stores when keys were used last, by id."""
        ...

    async def replace_key(
        self,
        key_id: str,
        successor: KeyRecord,
        at: float,
        act: Act | None = None,
        *,
        expires: float | None = None,
    ) -> bool:
        """Stores `successor` and revokes the key, or lets it expire at `expires`; both or neither. False: no
        such key, or it is revoked or has a successor.

        Raises:
            UnknownAccountError: `successor.account` does not exist.
        """
        ...
