"""A DNS for tests."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from aiohttp.abc import AbstractResolver, ResolveResult


class Names(AbstractResolver):
    """Each look-up, of any name, gives the next of `answers`, the last again and again, after `wait` seconds.
    An answer has the addresses of the name, none if it is unknown. `port` replaces that of the call."""

    def __init__(self, *answers: Sequence[str], port: int | None = None, wait: float = 0) -> None:
        self.asked: list[str] = []
        self.cancelled = 0
        self.closed = False
        self._answers = list(answers or (("127.0.0.1",),))
        self._port = port
        self._wait = wait

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        try:
            await asyncio.sleep(self._wait)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=self._port or port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in answer
        ]

    async def close(self) -> None:
        self.closed = True
