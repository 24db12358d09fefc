"""The keys role: hashes with one hash tag, so that a key can be replaced in one step.

What an earlier Pomelo does not know of a key is not in its record, which it reads too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic_core import from_json, to_json

from pomelo.errors import PomeloError
from pomelo.stores.accounts import PAGE
from pomelo.stores.acts import Act
from pomelo.stores.keys import KeyRecord
from pomelo.stores.redis.accounts import check_account
from pomelo.stores.redis.acts import act_args
from pomelo.stores.redis.connection import REPORT_TIMEOUT, Argument, one_deadline, scan, translated_errors
from pomelo.stores.redis.key_names import (
    BUDGETS,
    KEY_ACTS,
    KEY_NAMES,
    KEY_ORDER,
    KEY_SECRETS,
    KEYS,
    REVOKED,
    USED,
    key_order,
    key_position,
)
from pomelo.stores.redis.scripts import ADD_KEY, READ_FIELDS, REHASH_KEY, REPLACE_KEY, REVOKE_KEY, SET_BUDGET
from pomelo.stores.redis.wallet_index import Role, for_each

_FIELDS = ("key_id", "account", "live", "models", "created", "expires")


class Keys(Role):
    """Implements KeyStore."""

    @one_deadline
    async def get_key(self, key_id: str) -> KeyRecord | None:
        (found,) = await self._read([key_id])
        return found

    async def _read(self, key_ids: Sequence[str | bytes]) -> list[KeyRecord | None]:
        found = await self._connection.run(READ_FIELDS, [KEYS, REVOKED, KEY_NAMES, BUDGETS, USED], key_ids)
        return [
            None if text is None else _decode_key(text, *more) for text, *more in zip(*found, strict=True)
        ]

    @one_deadline
    async def add_key(self, record: KeyRecord, act: Act | None = None) -> None:
        await check_account(self._connection, record.account)
        added = await self._connection.run(
            ADD_KEY, _tables(record.account), [*_encode_new(record), *act_args(act)]
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
            return [record for record in await self._read(ids) if record is not None]

    async def _complete_key_order(self) -> None:
        """Adds the keys that an earlier Pomelo, without KEY_ORDER, has stored."""
        known = await self._connection.send("ZCARD", KEY_ORDER)
        if known >= await self._connection.send("HLEN", KEYS):
            return
        async for page in scan(self._connection, "HSCAN", KEYS):
            records = [_decode_key(text) for text in page.values()]
            positions: list[Argument] = [part for record in records for part in (0, _position(record))]
            with self._connection.one_deadline(REPORT_TIMEOUT):
                await for_each(
                    records, lambda r: self._connection.send("ZADD", key_order(r.account), 0, _position(r))
                )
                # KEY_ORDER comes last: its size shows whether the orders are complete.
                await self._connection.send("ZADD", KEY_ORDER, *positions)

    @one_deadline
    async def revoke_key(self, key_id: str, at: float, act: Act | None = None) -> KeyRecord | None:
        await self._connection.run(REVOKE_KEY, [KEYS, REVOKED, KEY_ACTS], [key_id, repr(at), *act_args(act)])
        return await self.get_key(key_id)

    @translated_errors
    async def set_budget(self, key_id: str, budget: str, act: Act | None = None) -> bool:
        args = [key_id, budget, *act_args(act)]
        return bool(await self._connection.run(SET_BUDGET, [KEYS, BUDGETS, KEY_ACTS], args))

    @one_deadline
    async def record_key_use(self, used: Mapping[str, float]) -> None:
        if not used:
            return
        # A server that could not store it for a while has an older use than the others.
        stored = await self._connection.send("HMGET", USED, *used)
        later: list[str] = []
        for (key_id, at), known in zip(used.items(), stored, strict=True):
            if known is None or float(known) < at:
                later += (key_id, repr(at))
        if later:
            await self._connection.send("HSET", USED, *later)

    @one_deadline
    async def replace_key(
        self,
        key_id: str,
        successor: KeyRecord,
        at: float,
        act: Act | None = None,
        *,
        expires: float | None = None,
    ) -> bool:
        await check_account(self._connection, successor.account)
        text = await self._connection.send("HGET", KEYS, key_id)
        (old,) = await self._read([key_id])
        if old is None:
            return False
        expiring = b"" if expires is None else to_json(from_json(text) | {"expires": expires})
        replaced = await self._connection.run(
            REPLACE_KEY,
            _tables(successor.account),
            [
                key_id,
                repr(at),
                *_encode_new(successor),
                *act_args(act),
                text,
                expiring,
                _encode_names(replace(old, successor=successor.key_id)),
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


def _position(record: KeyRecord) -> str:
    return key_position(record.created, record.key_id)


def _tables(account: str) -> list[str]:
    """The keys of the scripts that store a new API key."""
    return [KEYS, REVOKED, KEY_NAMES, BUDGETS, KEY_ORDER, key_order(account), KEY_ACTS]


def _encode_new(record: KeyRecord) -> list[Argument]:
    """A new API key as the arguments of a script."""
    names = _encode_names(record) if record.name or record.origin else ""
    revoked = "" if record.revoked is None else repr(record.revoked)
    return [record.key_id, _encode_key(record), revoked, names, record.budget, _position(record)]


def _encode_names(record: KeyRecord) -> bytes:
    return to_json([record.name, record.origin, record.successor])


def _encode_key(record: KeyRecord) -> bytes:
    return to_json({name: getattr(record, name) for name in _FIELDS} | {"digest": record.digest.hex()})


def _decode_key(
    text: bytes,
    revoked: bytes | None = None,
    names: bytes | None = None,
    budget: bytes | None = None,
    used: bytes | None = None,
) -> KeyRecord:
    values: dict[str, Any] = from_json(text)
    values["digest"] = bytes.fromhex(values["digest"])
    values["models"] = tuple(values["models"])
    name, origin, successor = ("", "", "") if names is None else from_json(names)
    return KeyRecord(
        **values,
        revoked=None if revoked is None else float(revoked),
        name=name,
        budget=(budget or b"").decode(),
        origin=origin,
        successor=successor,
        used=None if used is None else float(used),
    )
