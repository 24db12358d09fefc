"""A store that counts the look-ups of keys, and calls with a key that must be refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pomelo.accounts.keys import Keyring
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord

ROOT = b"r" * 64


class CountingStore:
    """Wraps a store, records its key look-ups, and counts the digests that are replaced; `on_look_up` runs once,
    during the next look-up."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.look_ups: list[str] = []
        self.rehashed = 0
        self.on_look_up: Callable[[], Awaitable[object]] | None = None

    async def get_key(self, key_id: str) -> KeyRecord | None:
        self.look_ups.append(key_id)
        record = await self.store.get_key(key_id)
        if self.on_look_up is not None:
            on_look_up, self.on_look_up = self.on_look_up, None
            await on_look_up()
        return record

    async def rehash_key(self, *arguments: Any) -> None:
        self.rehashed += 1
        await self.store.rehash_key(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def call(key: str | None, address: str = "") -> Call:
    return Call(api_key=key, request_id="req_1", protocol="rest", deadline=0.0, address=address)


async def refusal(keyring: Keyring, key: str | None, address: str = "") -> PomeloError:
    request = call(key, address)
    with pytest.raises(PomeloError) as caught:
        await keyring.authenticate(request)
    assert "X-Pomelo-Mode" not in request.response_headers
    return caught.value


async def assert_refused(keyring: Keyring, key: str | None) -> str:
    error = await refusal(keyring, key)
    assert error.code == "invalid_api_key"
    return error.message
