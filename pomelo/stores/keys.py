"""The keys role of a store: API keys, by id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pomelo.stores.accounts import PAGE


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as stored, with a digest in place of its secret. Times are Unix seconds. Empty `models` allows
    all models."""

    key_id: str
    account: str
    live: bool
    digest: bytes
    models: tuple[str, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None


class KeyStore(Protocol):
    """Stores API keys. Every method raises PomeloError store_unavailable if the store can't be reached."""

    async def get_key(self, key_id: str) -> KeyRecord | None:
        """The key with that id, even if it is revoked or expired, or None."""
        ...

    async def add_key(self, record: KeyRecord) -> None:
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

    async def revoke_key(self, key_id: str, at: float) -> KeyRecord | None:
        """Revokes a key for good. Revoking it again keeps the first time. None: no such key."""
        ...

    async def rehash_key(self, key_id: str, old: bytes, new: bytes, secret_id: str) -> None:
        """Replaces the digest `old` of a key by `new`, and notes the id of the secret that made `new`.
        Does nothing if the key has another digest. Idempotent."""
        ...

    async def keys_of_secret(self, secret_id: str, key_ids: Sequence[str]) -> set[str]:
        """Those of the keys whose digest was noted to be made with that secret."""
        ...

    async def replace_key(self, key_id: str, successor: KeyRecord, at: float) -> bool:
        """Stores `successor` and revokes the key, both or neither. False: no such key, or it is revoked.

        Raises:
            UnknownAccountError: `successor.account` does not exist.
        """
        ...
