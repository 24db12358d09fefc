"""Resolves host names to addresses, and remembers them for a moment."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from ipaddress import ip_address

from aiohttp.abc import AbstractResolver

from pomelo.providers.http.errors import UnknownHostError
from pomelo.runtime.process import shielded

TTL = 10.0
"""Seconds that addresses are remembered."""

AddressInfo = tuple[int, int, int, str, tuple[str, int]]
"""An address as `socket.getaddrinfo` returns it: family, type, protocol, an empty text, host and port."""

_Key = tuple[str, int]


class Addresses:
    """The addresses of host names, by `resolver`, which is closed with it. Concurrent look-ups of a name are
    one."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver
        self._known: dict[_Key, tuple[float, deque[AddressInfo]]] = {}
        self._pending: dict[_Key, asyncio.Task[deque[AddressInfo]]] = {}

    async def resolve(self, host: str, port: int) -> list[AddressInfo]:
        """Return the addresses of a name or of an address. The next call begins with the second one.

        Raises:
            UnknownHostError: the name has none.
            ValueError: the resolver refuses an address.
        """
        try:
            version = ip_address(host.partition("%")[0]).version
        except ValueError:
            pass
        else:
            return [_info(socket.AF_INET if version == 4 else socket.AF_INET6, host, port)]
        key = host, port
        expires, addresses = self._known.get(key, (0.0, deque[AddressInfo]()))
        if expires <= asyncio.get_running_loop().time():
            task = self._pending.get(key)
            if task is None:
                task = self._pending[key] = asyncio.create_task(self._look_up(key))
            addresses = await shielded(task)
        in_order = list(addresses)
        addresses.rotate(-1)
        return in_order

    async def close(self) -> None:
        for task in self._pending.values():
            task.cancel()
        await self._resolver.close()

    async def _look_up(self, key: _Key) -> deque[AddressInfo]:
        host, port = key
        try:
            found = await self._resolver.resolve(host, port, socket.AF_UNSPEC)
        except OSError as error:
            raise UnknownHostError from error
        finally:
            del self._pending[key]
        if not found:
            raise UnknownHostError
        addresses = deque(_info(one["family"], one["host"], one["port"]) for one in found)
        now = asyncio.get_running_loop().time()
        self._known = {name: known for name, known in self._known.items() if known[0] > now}
        self._known[key] = now + TTL, addresses
        return addresses


def _info(family: int, host: str, port: int) -> AddressInfo:
    return family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)
