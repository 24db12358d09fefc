"""Keys: how they look, how they are kept, and whom they speak for.

`pml_live_` or `pml_test_`, 12 characters of id, `_`, 32 characters of secret (190 bits), 6 of checksum. The
store keeps an HMAC of the whole key, so that its mode and id are bound to its secret. The engine calls
`Keyring.authenticate` for every call; the operator's service makes and ends keys. Nothing here knows of a
transport or of what a key is used for.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from pomelo.accounts.failed_keys import FailedKeys
from pomelo.call import Call, Principal
from pomelo.errors import PomeloError, invalid
from pomelo.secrets import derive_key
from pomelo.stores.accounts import DEFAULT_ACCOUNT, PAGE, AccountStore
from pomelo.stores.keys import KeyRecord, KeyStore

CACHE_SECONDS = 30.0
"""How long a key is believed without asking the store: how late another process's revocation may be seen."""

CACHE_SIZE = 10_000
"""Keys remembered at most."""

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_LIVE = "pml_live_"
_TEST = "pml_test_"
_PREFIX = 9
_ID = 12
_SECRET = 32
_CHECK = 6
_LENGTH = _PREFIX + _ID + 1 + _SECRET + _CHECK
_DIGITS = frozenset(ALPHABET)
_HOW = "Send it as 'Authorization: Bearer YOUR_API_KEY'"


def make_key(live: bool, choose: Callable[[str], str] = secrets.choice) -> tuple[str, str]:
    """A new key and its id; `choose` picks a character."""
    key_id = "".join([choose(ALPHABET) for _ in range(_ID)])
    secret = "".join([choose(ALPHABET) for _ in range(_SECRET)])
    body = f"{_LIVE if live else _TEST}{key_id}_{secret}"
    return body + _checksum(body), key_id


def parse(key: str) -> str | None:
    """The id of a key that looks right, checksum too; None for junk. Asks no store."""
    if len(key) != _LENGTH or not key.startswith((_LIVE, _TEST)):
        return None
    key_id, underscore, rest = key[_PREFIX : _PREFIX + _ID], key[_PREFIX + _ID], key[_PREFIX + _ID + 1 :]
    if underscore != "_" or not _DIGITS.issuperset(key_id) or not _DIGITS.issuperset(rest):
        return None
    return key_id if rest.endswith(_checksum(key[:-_CHECK])) else None


def _checksum(body: str) -> str:
    rest = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECK):
        rest, digit = divmod(rest, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


class Accounts(KeyStore, AccountStore, Protocol):
    """What the keyring needs of a store: keys, and the plans of their accounts."""


@dataclass(slots=True)
class _Known:
    """A key that was looked up. `ends` is Unix time, 0 for a revoked key; `until` is monotonic."""

    digest: bytes
    principal: Principal
    ends: float
    until: float


class Keyring:
    """Makes, checks and ends keys.

    `clock` is Unix time, for what is kept; `monotonic` times the cache, whose entries live `ttl` seconds;
    `failed_keys` limits the failures of an address.
    """

    def __init__(
        self,
        store: Accounts,
        root_secret: bytes,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        ttl: float = CACHE_SECONDS,
        failed_keys: FailedKeys | None = None,
    ) -> None:
        self._store = store
        self._pepper = derive_key(root_secret, "key-pepper")
        self._clock = clock
        self._monotonic = monotonic
        self._ttl = ttl
        self._failed_keys = failed_keys or FailedKeys(monotonic=monotonic)
        self._known: dict[str, _Known] = {}
        self._epoch = 0

    async def authenticate(self, call: Call) -> Principal:
        """Whom the call's key speaks for; notes its mode in the reply. `call.fault` is left to the caller.

        Raises:
            PomeloError: invalid_api_key, one and the same for a bad, revoked or expired key;
                rate_limit_exceeded instead, after too many from the call's address;
                store_unavailable.
        """
        if call.principal is not None:
            return call.principal
        key = call.api_key
        if key is None:
            raise self._failure(call, f"{call.key_error or 'Missing API key.'} {_HOW}")
        # A slice of the wrong thing is no id that is known; the digest is over the whole key anyway.
        known = self._known.get(key[_PREFIX : _PREFIX + _ID])
        if known is None or known.until <= self._monotonic():
            known = None if self._failed_keys.is_repeated(call.address, key) else await self._look_up(key)
        if known is not None:
            digest = hmac.digest(self._pepper, key.encode("utf-8", "replace"), "sha256")
            if hmac.compare_digest(digest, known.digest) and self._clock() < known.ends:
                principal = known.principal
                call.response_headers["X-Pomelo-Mode"] = principal.mode
                return principal
        raise self._failure(call, f"Invalid API key. {_HOW}")

    def _failure(self, call: Call, message: str) -> PomeloError:
        """Counts a failed key of the call's address, and returns the error to raise."""
        wait = self._failed_keys.count(call.address, call.api_key)
        if wait is None:
            return PomeloError("invalid_api_key", message)
        return PomeloError(
            "rate_limit_exceeded",
            f"{message}. Too many requests without a valid key came from your address: retry in {wait} s",
            retry_after=wait,
        )

    async def create(
        self,
        account: str = DEFAULT_ACCOUNT,
        live: bool = False,
        models: Iterable[str] = (),
        expires: float | None = None,
    ) -> tuple[KeyRecord, str]:
        """Makes a key: its record, and the key itself, which can't be had again. No `models`: all of them.

        Raises:
            UnknownAccountError: `account` is none.
            PomeloError: store_unavailable.
        """
        record, key = self._new(account, live, tuple(models), expires)
        await self._store.add_key(record)
        return record, key

    async def rotate(self, key_id: str) -> tuple[KeyRecord, str]:
        """Makes a key like another one and revokes the other, at once in this process.

        Raises:
            PomeloError: not_found; invalid_parameter (revoked or expired already); store_unavailable.
        """
        old = await self._store.get_key(key_id)
        if old is None:
            raise _unknown(key_id)
        now = self._clock()
        if old.expires is not None and old.expires <= now:
            raise invalid("key_id", "a key that has not expired. Create a new one")
        record, key = self._new(old.account, old.live, old.models, old.expires)
        replaced = await self._store.replace_key(key_id, record, now)
        self._forget(key_id)
        if not replaced:
            raise invalid("key_id", "a key that is not revoked. Create a new one")
        return record, key

    async def revoke(self, key_id: str) -> KeyRecord:
        """Ends a key: at once in this process, within the cache's time in others. Idempotent.

        Raises:
            PomeloError: not_found, store_unavailable.
        """
        record = await self._store.revoke_key(key_id, self._clock())
        self._forget(key_id)
        if record is None:
            raise _unknown(key_id)
        return record

    async def list(
        self, account: str | None = None, *, limit: int = PAGE, after: tuple[float, str] | None = None
    ) -> list[KeyRecord]:
        """At most `limit` keys of an account, or of all; oldest first. `after` is the time and
        the id of the last key of the previous page.

        Raises:
            PomeloError: store_unavailable.
        """
        return await self._store.list_keys(account, limit=limit, after=after)

    def forget_account(self, account: str) -> None:
        """Asks the store again for the keys of an account whose plan has changed."""
        for key_id in [i for i, known in self._known.items() if known.principal.account == account]:
            del self._known[key_id]
        self._epoch += 1

    def _new(
        self, account: str, live: bool, models: tuple[str, ...], expires: float | None
    ) -> tuple[KeyRecord, str]:
        key, key_id = make_key(live)
        digest = hmac.digest(self._pepper, key.encode(), hashlib.sha256)
        return KeyRecord(key_id, account, live, digest, models, self._clock(), expires), key

    async def _look_up(self, key: str) -> _Known | None:
        """What the store knows. Junk never reaches it, and what it doesn't know is not remembered."""
        key_id = parse(key)
        if key_id is None:
            return None
        epoch = self._epoch
        record = await self._store.get_key(key_id)
        if record is None:
            return None
        account = await self._store.get_account(record.account)
        ends = math.inf if record.expires is None else record.expires
        known = _Known(
            digest=record.digest,
            principal=Principal(
                record.account,
                key_id,
                record.live,
                frozenset(record.models) if record.models else None,
                account.plan if account is not None else "",
            ),
            ends=ends if record.revoked is None else 0.0,
            until=self._monotonic() + self._ttl,
        )
        # A key that was ended while we asked must not come back by an answer from before.
        if epoch == self._epoch:
            self._known.pop(key_id, None)
            if len(self._known) >= CACHE_SIZE:
                del self._known[next(iter(self._known))]
            self._known[key_id] = known
        return known

    def _forget(self, key_id: str) -> None:
        self._epoch += 1
        self._known.pop(key_id, None)


def _unknown(key_id: str) -> PomeloError:
    return PomeloError("not_found", f"There is no key {key_id[:40]!r}. See: pomelo keys list", field="key_id")
