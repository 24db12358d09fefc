"""API keys: their storage, and the authentication of calls.

The store keeps an HMAC of the whole key, so that its mode and id are bound to its secret.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from pomelo.accounts.acts import describe_key, key_act
from pomelo.accounts.budgets import budget_of
from pomelo.accounts.failed_keys import FailedKeys
from pomelo.accounts.key_format import ID, make_key, parse
from pomelo.call import MODE_NAMES, Call, Principal
from pomelo.errors import FAILED_KEYS_QUOTA, PomeloError, invalid, missing
from pomelo.protobuf import times
from pomelo.runtime.logs import UnexpectedErrors
from pomelo.runtime.process import periodically
from pomelo.secrets import derive_key, derive_keys
from pomelo.stores.accounts import DEFAULT_ACCOUNT
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord

log = logging.getLogger("pomelo.accounts")

CACHE_SECONDS = 30.0
"""How long a key is cached: the time until a revocation in another process takes effect."""

CACHE_SIZE = 10_000
"""The maximum number of cached keys."""

LOOK_UP_TIME = 5.0
"""Seconds that the store has to look up a key: less than a call may take without a valid key."""

USE_INTERVAL = 60.0
"""Seconds between two times at which it is stored when keys were used last."""

_HINT = "Send it as 'Authorization: Bearer YOUR_API_KEY'"


@dataclass(slots=True)
class _CachedKey:
    """A key from the store. `expires` is Unix time, 0 for a revoked key or a `disabled` account;
    `cached_until` is monotonic."""

    digest: bytes
    principal: Principal
    expires: float
    cached_until: float
    disabled: bool


class Keyring:
    """Creates, checks and revokes keys.

    Keys whose digest was made with one of the `previous` root secrets are valid too. When one is used, its
    digest is replaced by one of the current secret.

    `clock` returns Unix time, for stored times; `monotonic` is the clock of the cache; `failed_keys` limits
    the failures of an address.
    """

    def __init__(
        self,
        store: Store,
        root_secret: bytes,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        failed_keys: FailedKeys | None = None,
        previous: Sequence[bytes] = (),
    ) -> None:
        self._store = store
        self._hmac = hmac.new(derive_key(root_secret, "key-pepper"), digestmod=hashlib.sha256)
        """Copied for each key: that takes a third of the time of a new one."""
        self._previous = derive_keys(previous, "key-pepper")
        self._secret_id = derive_key(root_secret, "secret id")[:8].hex()
        self._rehashing: set[asyncio.Task[None]] = set()
        self._clock = clock
        self._monotonic = monotonic
        self._failed_keys = failed_keys or FailedKeys(monotonic=monotonic)
        self._cache: dict[str, _CachedKey] = {}
        self._epoch = 0
        self._used: dict[str, float] = {}
        """When keys were used last, by id, if that is not yet stored."""

    async def authenticate(self, call: Call) -> Principal:
        """Returns the principal of the call's key, and sets the mode in the response headers. Does not raise
        `call.header_error`.

        Raises:
            PomeloError: invalid_api_key, the same for a bad, revoked or expired key, or with a message of
                its own if the account is disabled; rate_limit_exceeded instead, after too many failures from
                the call's address; store_unavailable.
        """
        key = call.api_key
        if key is None:
            raise self._failure(call, None, f"{call.key_error or 'Missing API key.'} {_HINT}")
        # A malformed key may have a cached id in this place: the digest is of the whole key and fails it.
        cached = self._cache.get(key[ID])
        looked_up = cached is None or cached.cached_until <= self._monotonic()
        if looked_up:
            cached = None if self._failed_keys.is_repeated(call.address, key) else await self._look_up(key)
        if cached is not None and (
            hmac.compare_digest(self._digest(key), cached.digest) or self._is_previous(key, cached)
        ):
            now = self._clock()
            if now < cached.expires:
                principal = cached.principal
                if looked_up:  # as often as the cache forgets it
                    self._used[principal.key_id] = now - now % 60
                call.response_headers["X-Pomelo-Mode"] = MODE_NAMES[principal.live]
                return principal
            if cached.disabled:
                # Not remembered as a bad key: it is valid as soon as the account is enabled.
                raise self._failure(
                    call, None, "The account of this API key is disabled. Ask the operator of the service"
                )
        raise self._failure(call, key, f"Invalid API key. {_HINT}")

    def _failure(self, call: Call, bad_key: str | None, message: str) -> PomeloError:
        """Counts a failed key for the call's address, and returns the error to raise."""
        wait = self._failed_keys.count(call.address, bad_key)
        if wait is None:
            return PomeloError("invalid_api_key", message)
        return PomeloError(
            "rate_limit_exceeded",
            f"{message}. Your address sent too many requests without a valid key: retry in {wait} s",
            retry_after=wait,
            values={"quota": FAILED_KEYS_QUOTA, "retryAfter": wait},
        )

    async def create(
        self,
        account: str = DEFAULT_ACCOUNT,
        live: bool = False,
        models: Iterable[str] = (),
        expires: float | None = None,
        *,
        name: str = "",
        budget: str = "",
    ) -> tuple[KeyRecord, str]:
        """Creates a key; returns its record and the key itself, which can't be read again. An empty `models`
        allows all models.

        Raises:
            UnknownAccountError: `account` does not exist.
            PomeloError: store_unavailable.
        """
        key, key_id = make_key(live)
        record = KeyRecord(
            key_id,
            account,
            live,
            self._digest(key),
            tuple(models),
            self._clock(),
            expires,
            name=name,
            budget=budget,
        )
        await self._store.add_key(
            record, key_act("create_key", record, record.created, new=describe_key(record))
        )
        await self._note_secret(record)
        return record, key

    async def rotate(self, key_id: str, grace: float = 0.0) -> tuple[KeyRecord, str]:
        """Replaces a key: creates one with the same properties, and revokes the old one, immediately in this
        process, within the cache's time in others; or lets it expire in `grace` seconds. Returns the new
        key's record and the key itself.

        Raises:
            PomeloError: missing_parameter, not_found; invalid_parameter (revoked, expired or rotated
                already); store_unavailable.
        """
        old = await self._found(key_id)
        now = self._clock()
        if old.expires is not None and old.expires <= now:
            raise invalid("id", "a key that has not expired. Create a new one")
        if old.successor:
            raise invalid("id", f"a key that was not rotated yet. Rotate its successor {old.successor}")
        key, successor_id = make_key(old.live)
        record = replace(
            old,
            key_id=successor_id,
            digest=self._digest(key),
            created=now,
            origin=old.origin or key_id,
            successor="",
            used=None,
        )
        expires = None
        successor = successor_id
        if grace:
            expires = now + grace if old.expires is None else min(old.expires, now + grace)
            successor += f"; the old key expires {times.to_timestamp(expires).ToJsonString()}"
        act = key_act("rotate_key", old, now, new=successor)
        replaced = await self._store.replace_key(key_id, record, now, act, expires=expires)
        self._forget(key_id)
        if not replaced:
            raise invalid("id", "a key that is not revoked. Create a new one")
        await self._note_secret(record)
        return record, key

    async def revoke(self, key_id: str) -> KeyRecord:
        """Revokes a key: immediately in this process, within the cache's time in others. Idempotent.

        Raises:
            PomeloError: missing_parameter, not_found, store_unavailable.
        """
        old = await self._found(key_id)
        now = self._clock()
        record = await self._store.revoke_key(key_id, now, key_act("revoke_key", old, now))
        self._forget(key_id)
        return record or old

    async def set_budget(self, key_id: str, budget: str) -> KeyRecord:
        """Changes the budget of a key, or removes it (empty): immediately in this process, within the cache's
        time in others.

        Raises:
            PomeloError: missing_parameter, not_found, store_unavailable.
        """
        record = await self._found(key_id)
        act = key_act("set_key_budget", record, self._clock(), new=budget)
        await self._store.set_budget(key_id, budget, act)
        self._forget(key_id)
        return replace(record, budget=budget)

    async def save_use(self) -> None:
        """Stores when keys were used last.

        Raises:
            PomeloError: store_unavailable.
        """
        used, self._used = self._used, {}
        try:
            if used:
                await self._store.record_key_use(used)
        except BaseException:  # also if it is cancelled: the store may not have stored them
            self._used = used | self._used
            raise

    async def keep_use(self) -> None:
        """Until cancelled, periodically stores when keys were used last, and a last time then."""
        try:
            await periodically(
                self.save_use, USE_INTERVAL, "The last use of keys was not stored", UnexpectedErrors(log)
            )
        finally:
            with suppress(PomeloError):
                await self.save_use()

    async def keys_of_previous_secrets(self, records: Sequence[KeyRecord]) -> set[str]:
        """The ids of those of the keys whose digest is not known to be made with the current secret; none if
        there are no previous secrets.

        Raises:
            PomeloError: store_unavailable.
        """
        if not self._previous:
            return set()
        ids = [record.key_id for record in records]
        return set(ids) - await self._store.keys_of_secret(self._secret_id, ids)

    async def finish(self) -> None:
        """Waits until the digests of used keys are replaced."""
        if self._rehashing:
            await asyncio.wait(self._rehashing)

    def forget_account(self, account: str) -> None:
        """Removes the keys of an account that has changed from the cache."""
        for key_id in [i for i, cached in self._cache.items() if cached.principal.account == account]:
            del self._cache[key_id]
        self._epoch += 1

    async def _found(self, key_id: str) -> KeyRecord:
        if not key_id:
            raise missing("id")
        record = await self._store.get_key(key_id)
        if record is None:
            shown = key_id[:40]
            message = f"There is no key {shown!r}. See: pomelo keys list"
            raise PomeloError("not_found", message, field="id", values={"keyId": shown})
        return record

    def _digest(self, key: str) -> bytes:
        digest = self._hmac.copy()
        digest.update(key.encode("utf-8", "replace"))
        return digest.digest()

    def _is_previous(self, key: str, cached: _CachedKey) -> bool:
        """Whether the digest of a key was made with a previous secret. If so, replaces it."""
        for pepper in self._previous:
            old = hmac.digest(pepper, key.encode("utf-8", "replace"), hashlib.sha256)
            if hmac.compare_digest(old, cached.digest):
                cached.digest = self._digest(key)
                self._rehash(cached.principal.key_id, old, cached.digest)
                return True
        return False

    def _rehash(self, key_id: str, old: bytes, new: bytes) -> None:
        async def rehash() -> None:
            with suppress(PomeloError):  # the next look-up tries again
                await self._store.rehash_key(key_id, old, new, self._secret_id)

        task = asyncio.create_task(rehash())
        self._rehashing.add(task)
        task.add_done_callback(self._rehashing.discard)

    async def _note_secret(self, record: KeyRecord) -> None:
        if self._previous:
            with suppress(PomeloError):  # its first use notes it again
                await self._store.rehash_key(record.key_id, record.digest, record.digest, self._secret_id)

    async def _look_up(self, key: str) -> _CachedKey | None:
        """Reads a key from the store. Malformed keys do not reach it; unknown keys are not cached.

        Raises:
            PomeloError: store_unavailable; also if the store hangs.
        """
        key_id = parse(key)
        if key_id is None:
            return None
        epoch = self._epoch
        try:
            async with asyncio.timeout(LOOK_UP_TIME):
                record = await self._store.get_key(key_id)
                if record is None:
                    return None
                account = await self._store.get_account(record.account)
        except TimeoutError:
            raise PomeloError("store_unavailable") from None
        if self._previous and hmac.compare_digest(digest := self._digest(key), record.digest):
            self._rehash(key_id, digest, digest)  # otherwise unknown: the key was made before the rotation
        expires = math.inf if record.expires is None else record.expires
        disabled = account is not None and account.disabled is not None
        cached = _CachedKey(
            digest=record.digest,
            principal=Principal(
                record.account,
                key_id,
                record.live,
                frozenset(record.models) if record.models else None,
                account.plan if account is not None else "",
                budget_of(record),
            ),
            expires=0.0 if disabled or record.revoked is not None else expires,
            cached_until=self._monotonic() + CACHE_SECONDS,
            disabled=disabled and record.revoked is None,
        )
        # A key that was revoked during the look-up must not be cached as valid.
        if epoch == self._epoch:
            self._cache.pop(key_id, None)
            if len(self._cache) >= CACHE_SIZE:
                del self._cache[next(iter(self._cache))]
            self._cache[key_id] = cached
        return cached

    def _forget(self, key_id: str) -> None:
        self._epoch += 1
        self._cache.pop(key_id, None)
