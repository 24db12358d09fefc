"""The role of keys: two tables of one tag, so that a key is replaced in one step."""

from typing import Any

from pydantic_core import from_json, to_json

from pomelo.errors import PomeloError
from pomelo.stores.base import KeyRecord, UnknownAccountError
from pomelo.stores.redis.link import Link, one_call
from pomelo.stores.redis.names import ACCOUNTS, KEYS, REVOKED
from pomelo.stores.redis.scripts import ADD_KEY, REPLACE_KEY, REVOKE_KEY

_NAMES = ("key_id", "account", "live", "models", "created", "expires")


class Keys:
    """See KeyStore."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @one_call
    async def get_key(self, key_id: str) -> KeyRecord | None:
        """See KeyStore."""
        text = await self._link.send("HGET", KEYS, key_id)
        if text is None:
            return None
        return _read(text, await self._link.send("HGET", REVOKED, key_id))

    @one_call
    async def add_key(self, record: KeyRecord) -> None:
        """See KeyStore."""
        await self._check(record)
        added = await self._link.run(
            ADD_KEY, [KEYS, REVOKED], [record.key_id, _written(record), _time(record.revoked)]
        )
        if not added:
            raise PomeloError("store_unavailable")

    @one_call
    async def list_keys(self, account: str | None = None) -> list[KeyRecord]:
        """See KeyStore."""
        kept = await self._link.send("HGETALL", KEYS)
        revoked = await self._link.send("HGETALL", REVOKED)
        found = [_read(text, revoked.get(key_id)) for key_id, text in kept.items()]
        return sorted(
            (key for key in found if account in (None, key.account)),
            key=lambda key: (key.created, key.key_id),
        )

    @one_call
    async def revoke_key(self, key_id: str, at: float) -> KeyRecord | None:
        """See KeyStore."""
        await self._link.run(REVOKE_KEY, [KEYS, REVOKED], [key_id, repr(at)])
        return await self.get_key(key_id)

    @one_call
    async def replace_key(self, key_id: str, successor: KeyRecord, at: float) -> bool:
        """See KeyStore."""
        await self._check(successor)
        replaced = await self._link.run(
            REPLACE_KEY,
            [KEYS, REVOKED],
            [key_id, repr(at), successor.key_id, _written(successor), _time(successor.revoked)],
        )
        if replaced < 0:
            raise PomeloError("store_unavailable")
        return bool(replaced)

    async def _check(self, record: KeyRecord) -> None:
        # No account is ever taken away, so this needs no step of its own.
        if not await self._link.send("HEXISTS", ACCOUNTS, record.account):
            raise UnknownAccountError(record.account)


def _time(at: float | None) -> str:
    return "" if at is None else repr(at)


def _written(record: KeyRecord) -> bytes:
    return to_json({name: getattr(record, name) for name in _NAMES} | {"digest": record.digest.hex()})


def _read(text: bytes, revoked: bytes | None) -> KeyRecord:
    values: dict[str, Any] = from_json(text)
    values["digest"] = bytes.fromhex(values["digest"])
    values["models"] = tuple(values["models"])
    return KeyRecord(**values, revoked=None if revoked is None else float(revoked))
