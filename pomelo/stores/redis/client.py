"""redis-py as the store uses it: without retries of its own, and many callers' commands in one go."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

from redis import exceptions as errors
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from pomelo.stores.redis.connection import Part

_LANES = 2
"""Connections of one server: while one waits for its answers, the next commands gather for the other."""

_AT_ONCE = 64
"""Commands that are sent in one go at most; of a cluster: that are under way at once."""


class OneServer:
    """A server, or the one that Sentinels name. Commands of callers who come at once share a round trip."""

    cluster = False

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: deque[tuple[tuple[Part, ...], asyncio.Future[Any]]] = deque()
        self._lanes: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._closed = False

    async def execute_command(self, *command: Part) -> Any:
        """See Client."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, answer))
        self._begin()
        return await answer

    async def info(self) -> list[dict[str, Any]]:
        """What the server says of itself."""
        return [await self._redis.info()]

    async def aclose(self) -> None:
        """See Client."""
        self._closed = True
        for lane in list(self._lanes):
            lane.cancel()
        _fail([answer for _, answer in self._waiting])
        await self._redis.aclose()

    def _begin(self) -> None:
        """Starts a lane if commands are waiting and fewer than _LANES are busy."""
        if self._waiting and self._busy < _LANES and not self._closed:
            self._busy += 1
            lane = asyncio.create_task(self._send())
            self._lanes.add(lane)
            lane.add_done_callback(self._lanes.discard)

    async def _send(self) -> None:
        try:
            while self._waiting:
                await self._send_batch()
        finally:
            # At once, not when the task is seen to be done: a command that came in between would wait.
            self._busy -= 1
            self._begin()  # However the lane ended, what is left must not wait for the next command.

    async def _send_batch(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(_AT_ONCE, len(self._waiting)))]
        # Who left, because its time was over, needs no answer; what it asks for may be repeated anyhow.
        batch = [(command, answer) for command, answer in batch if not answer.done()]
        if not batch:
            return
        try:
            answers = await self._answers([command for command, _ in batch])
        except Exception as error:
            answers = [error] * len(batch)
        except BaseException:
            _fail([answer for _, answer in batch])
            raise
        for (_, answer), found in zip(batch, answers, strict=True):
            if answer.done():
                continue
            if isinstance(found, Exception):
                answer.set_exception(found)
            else:
                answer.set_result(found)
        if any(isinstance(found, Exception) and _is_suspect(found) for found in answers):
            with suppress(Exception):  # the next commands will report it
                await self._redis.connection_pool.disconnect(inuse_connections=False)

    async def _answers(self, commands: list[tuple[Part, ...]]) -> list[Any]:
        """The answers to commands, or the error of each, in their order."""
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        found: list[Any] = await pipeline.execute(raise_on_error=False)
        if len(found) != len(commands):
            raise errors.InvalidResponse(f"{len(found)} answers to {len(commands)} commands")
        return found


def _is_suspect(error: Exception) -> bool:
    """Whether idle connections must be closed after this error. Either the server has become a
    replica and its name may now lead to another server, or the error is unexpected and connections
    may hold leftover data."""
    return isinstance(error, errors.ReadOnlyError) or not isinstance(error, (errors.RedisError, OSError))


def _fail(answers: list[asyncio.Future[Any]]) -> None:
    """Tells who waits that nothing comes any more. It is the lane that was cancelled, not they."""
    for answer in answers:
        if not answer.done():
            answer.set_exception(errors.ConnectionError("closed"))


class Cluster:
    """The servers of a cluster. Each command goes to the one that has its key."""

    cluster = True

    def __init__(self, redis: RedisCluster) -> None:
        self._redis = redis
        self._gate = asyncio.Semaphore(_AT_ONCE)

    async def execute_command(self, *command: Part) -> Any:
        """See Client."""
        async with self._gate:
            return await self._redis.execute_command(*command)

    async def info(self) -> list[dict[str, Any]]:
        """What the servers that take writes say of themselves."""
        found = await self._redis.info(target_nodes=RedisCluster.PRIMARIES)
        return [found] if "redis_version" in found else list(found.values())

    async def aclose(self) -> None:
        """See Client."""
        await self._redis.aclose()
