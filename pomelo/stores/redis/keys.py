"""The role of keys: two tables of one tag, so that a key is replaced in one step."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json, to_json

from pomelo.errors import PomeloError
from pomelo.stores.base import KeyRecord, UnknownAccountError
from pomelo.stores.ledger import PAGE
from pomelo.stores.redis.connection import PATIENCE, Link, Part, contained, one_call, scanned
from pomelo.stores.redis.key_names import ACCOUNTS, KEY_ORDER, KEYS, REVOKED, key_order, key_place
from pomelo.stores.redis.scripts import ADD_KEY, REPLACE_KEY, REVOKE_KEY
from pomelo.stores.redis.wallet_index import each

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
            ADD_KEY,
            [KEYS, REVOKED, KEY_ORDER, key_order(record.account)],
            [record.key_id, _written(record), _time(record.revoked), _place(record)],
        )
        if not added:
            raise PomeloError("store_unavailable")

    @contained
    async def list_keys(
        self, account: str | None = None, *, limit: int = PAGE, after: tuple[float, str] | None = None
    ) -> list[KeyRecord]:
        """See KeyStore."""
        if after is None:
            await self._complete_key_order()
        order = KEY_ORDER if account is None else key_order(account)
        start = f"({key_place(*after)}" if after is not None else "-"
        places = await self._link.send("ZRANGEBYLEX", order, start, "+", "LIMIT", 0, limit)
        if not places:
            return []
        ids = [place.partition(b":")[2] for place in places]
        with self._link.one_call(PATIENCE):
            kept = await self._link.send("HMGET", KEYS, *ids)
            revoked = await self._link.send("HMGET", REVOKED, *ids)
        return [_read(text, at) for text, at in zip(kept, revoked, strict=True)]

    async def _complete_key_order(self) -> None:
        """Adds the keys of an earlier Pomelo, which kept no order, to KEY_ORDER and `key_order`."""
        known = await self._link.send("ZCARD", KEY_ORDER)
        if known >= await self._link.send("HLEN", KEYS):
            return
        async for page in scanned(self._link, KEYS):
            records = [_read(text, None) for text in page.values()]
            places: list[Part] = [part for record in records for part in (0, _place(record))]
            with self._link.one_call(PATIENCE):
                await each(records, lambda r: self._link.send("ZADD", key_order(r.account), 0, _place(r)))
                # KEY_ORDER is last: its size shows whether the accounts' orders are complete.
                await self._link.send("ZADD", KEY_ORDER, *places)

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
            [KEYS, REVOKED, KEY_ORDER, key_order(successor.account)],
            [
                key_id,
                repr(at),
                successor.key_id,
                _written(successor),
                _time(successor.revoked),
                _place(successor),
            ],
        )
        if replaced < 0:
            raise PomeloError("store_unavailable")
        return bool(replaced)

    async def _check(self, record: KeyRecord) -> None:
        # No account is ever taken away, so this needs no step of its own.
        if not await self._link.send("HEXISTS", ACCOUNTS, record.account):
            raise UnknownAccountError(record.account)


def _place(record: KeyRecord) -> str:
    return key_place(record.created, record.key_id)


def _time(at: float | None) -> str:
    return "" if at is None else repr(at)


def _written(record: KeyRecord) -> bytes:
    return to_json({name: getattr(record, name) for name in _NAMES} | {"digest": record.digest.hex()})


def _read(text: bytes, revoked: bytes | None) -> KeyRecord:
    values: dict[str, Any] = from_json(text)
    values["digest"] = bytes.fromhex(values["digest"])
    values["models"] = tuple(values["models"])
    return KeyRecord(**values, revoked=None if revoked is None else float(revoked))
