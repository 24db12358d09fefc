"""redis-py as the store uses it: without retries of its own, and with the commands of many callers
pipelined."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

from redis import exceptions as errors
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from pomelo.stores.redis.connection import Argument

_MAX_SENDERS = 2
"""Connections of one server: while one waits for its replies, commands gather for the other."""

_MAX_PIPELINED = 64
"""Maximum number of commands in one pipeline; in a cluster, of commands that run concurrently."""


class SingleServer:
    """A server, or the primary that Sentinels name. Commands that are sent concurrently share a round
    trip."""

    cluster = False

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._queue: deque[tuple[tuple[Argument, ...], asyncio.Future[Any]]] = deque()
        self._senders: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._closed = False

    async def execute_command(self, *command: Argument) -> Any:
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((command, reply))
        self._start_sender()
        return await reply

    async def info(self) -> list[dict[str, Any]]:
        """The server's answer to INFO."""
        return [await self._redis.info()]

    async def aclose(self) -> None:
        self._closed = True
        for sender in list(self._senders):
            sender.cancel()
        _fail([reply for _, reply in self._queue])
        await self._redis.aclose()

    def _start_sender(self) -> None:
        """Starts a sender if commands are queued and fewer than _MAX_SENDERS are busy."""
        if self._queue and self._busy < _MAX_SENDERS and not self._closed:
            self._busy += 1
            sender = asyncio.create_task(self._send())
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)

    async def _send(self) -> None:
        try:
            while self._queue:
                await self._send_batch()
        finally:
            # Here, not in a callback of the task: a command that is queued in between would wait.
            self._busy -= 1
            self._start_sender()  # after a failure, the queued commands must not wait for the next one

    async def _send_batch(self) -> None:
        batch = [self._queue.popleft() for _ in range(min(_MAX_PIPELINED, len(self._queue)))]
        # A caller whose deadline has passed needs no reply; the command will be repeated if needed.
        batch = [(command, reply) for command, reply in batch if not reply.done()]
        if not batch:
            return
        try:
            results = await self._execute([command for command, _ in batch])
        except Exception as error:
            results = [error] * len(batch)
        except BaseException:
            _fail([reply for _, reply in batch])
            raise
        for (_, reply), result in zip(batch, results, strict=True):
            if reply.done():
                continue
            if isinstance(result, Exception):
                reply.set_exception(result)
            else:
                reply.set_result(result)
        if any(isinstance(result, Exception) and _needs_reconnect(result) for result in results):
            with suppress(Exception):  # the next commands will report it
                await self._redis.connection_pool.disconnect(inuse_connections=False)

    async def _execute(self, commands: list[tuple[Argument, ...]]) -> list[Any]:
        """The reply or error of each command, in order."""
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        results: list[Any] = await pipeline.execute(raise_on_error=False)
        if len(results) != len(commands):
            raise errors.InvalidResponse(f"{len(results)} replies to {len(commands)} commands")
        return results


def _needs_reconnect(error: Exception) -> bool:
    """Whether idle connections must be closed after this error: the server has become a replica and its name
    may now lead to another server, or the error is unexpected and connections may hold leftover data."""
    return isinstance(error, errors.ReadOnlyError) or not isinstance(error, (errors.RedisError, OSError))


def _fail(replies: list[asyncio.Future[Any]]) -> None:
    # An error, not a cancellation: the sender was cancelled, not the callers.
    for reply in replies:
        if not reply.done():
            reply.set_exception(errors.ConnectionError("closed"))


class Cluster:
    """The servers of a cluster. Each command goes to the server that has its key."""

    cluster = True

    def __init__(self, redis: RedisCluster) -> None:
        self._redis = redis
        self._slots = asyncio.Semaphore(_MAX_PIPELINED)

    async def execute_command(self, *command: Argument) -> Any:
        async with self._slots:
            return await self._redis.execute_command(*command)

    async def info(self) -> list[dict[str, Any]]:
        """The primaries' answers to INFO."""
        found = await self._redis.info(target_nodes=RedisCluster.PRIMARIES)
        return [found] if "redis_version" in found else list(found.values())

    async def aclose(self) -> None:
        await self._redis.aclose()
