"""The keys role: two hashes with one hash tag, so that a key can be replaced in one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json, to_json

from pomelo.errors import PomeloError
from pomelo.stores.accounts import PAGE, UnknownAccountError
from pomelo.stores.keys import KeyRecord
from pomelo.stores.redis.connection import (
    REPORT_TIMEOUT,
    Argument,
    Connection,
    one_deadline,
    scan_hash,
    translated_errors,
)
from pomelo.stores.redis.key_names import (
    ACCOUNTS,
    KEY_ORDER,
    KEY_SECRETS,
    KEYS,
    REVOKED,
    key_order,
    key_position,
)
from pomelo.stores.redis.scripts import ADD_KEY, REHASH_KEY, REPLACE_KEY, REVOKE_KEY
from pomelo.stores.redis.wallet_index import for_each

_FIELDS = ("key_id", "account", "live", "models", "created", "expires")


class Keys:
    """Implements KeyStore."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @one_deadline
    async def get_key(self, key_id: str) -> KeyRecord | None:
        text = await self._connection.send("HGET", KEYS, key_id)
        if text is None:
            return None
        return _decode_key(text, await self._connection.send("HGET", REVOKED, key_id))

    @one_deadline
    async def add_key(self, record: KeyRecord) -> None:
        await self._check_account(record)
        added = await self._connection.run(
            ADD_KEY,
            [KEYS, REVOKED, KEY_ORDER, key_order(record.account)],
            [record.key_id, _encode_key(record), _format_time(record.revoked), _position(record)],
        )
        if not added:
            raise PomeloError("store_unavailable")

    @translated_errors
    async def list_keys(
        self, account: str | None = None, *, limit: int = PAGE, after: tuple[float, str] | None = None
    ) -> list[KeyRecord]:
        if after is None:
            await self._complete_key_order()
        order = KEY_ORDER if account is None else key_order(account)
        start = f"({key_position(*after)}" if after is not None else "-"
        positions = await self._connection.send("ZRANGEBYLEX", order, start, "+", "LIMIT", 0, limit)
        if not positions:
            return []
        ids = [position.partition(b":")[2] for position in positions]
        with self._connection.one_deadline(REPORT_TIMEOUT):
            texts = await self._connection.send("HMGET", KEYS, *ids)
            revoked = await self._connection.send("HMGET", REVOKED, *ids)
        return [_decode_key(text, at) for text, at in zip(texts, revoked, strict=True)]

    async def _complete_key_order(self) -> None:
        """Adds the keys that an earlier Pomelo, without KEY_ORDER, has stored."""
        known = await self._connection.send("ZCARD", KEY_ORDER)
        if known >= await self._connection.send("HLEN", KEYS):
            return
        async for page in scan_hash(self._connection, KEYS):
            records = [_decode_key(text, None) for text in page.values()]
            positions: list[Argument] = [part for record in records for part in (0, _position(record))]
            with self._connection.one_deadline(REPORT_TIMEOUT):
                await for_each(
                    records, lambda r: self._connection.send("ZADD", key_order(r.account), 0, _position(r))
                )
                # KEY_ORDER comes last: its size shows whether the orders are complete.
                await self._connection.send("ZADD", KEY_ORDER, *positions)

    @one_deadline
    async def revoke_key(self, key_id: str, at: float) -> KeyRecord | None:
        await self._connection.run(REVOKE_KEY, [KEYS, REVOKED], [key_id, repr(at)])
        return await self.get_key(key_id)

    @one_deadline
    async def replace_key(self, key_id: str, successor: KeyRecord, at: float) -> bool:
        await self._check_account(successor)
        replaced = await self._connection.run(
            REPLACE_KEY,
            [KEYS, REVOKED, KEY_ORDER, key_order(successor.account)],
            [
                key_id,
                repr(at),
                successor.key_id,
                _encode_key(successor),
                _format_time(successor.revoked),
                _position(successor),
            ],
        )
        if replaced < 0:
            raise PomeloError("store_unavailable")
        return bool(replaced)

    @one_deadline
    async def rehash_key(self, key_id: str, old: bytes, new: bytes, secret_id: str) -> None:
        arguments = [key_id, old.hex(), new.hex(), secret_id]
        await self._connection.run(REHASH_KEY, [KEYS, KEY_SECRETS], arguments)

    @one_deadline
    async def keys_of_secret(self, secret_id: str, key_ids: Sequence[str]) -> set[str]:
        if not key_ids:
            return set()
        noted = await self._connection.send("HMGET", KEY_SECRETS, *key_ids)
        wanted = secret_id.encode()
        return {key_id for key_id, one in zip(key_ids, noted, strict=True) if one == wanted}

    async def _check_account(self, record: KeyRecord) -> None:
        # Accounts are never deleted, so this need not be part of the script.
        if not await self._connection.send("HEXISTS", ACCOUNTS, record.account):
            raise UnknownAccountError(record.account)


def _position(record: KeyRecord) -> str:
    return key_position(record.created, record.key_id)


def _format_time(at: float | None) -> str:
    return "" if at is None else repr(at)


def _encode_key(record: KeyRecord) -> bytes:
    return to_json({name: getattr(record, name) for name in _FIELDS} | {"digest": record.digest.hex()})


def _decode_key(text: bytes, revoked: bytes | None) -> KeyRecord:
    values: dict[str, Any] = from_json(text)
    values["digest"] = bytes.fromhex(values["digest"])
    values["models"] = tuple(values["models"])
    return KeyRecord(**values, revoked=None if revoked is None else float(revoked))
