"""The servers as the store uses them: without retries, and with the commands of many callers in one write."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, cast

from redis import exceptions as errors
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from pomelo.runtime.process import fail, resolve, stop
from pomelo.stores.redis.connection import Argument, NotSentError
from pomelo.stores.redis.link import Command, Decoder, Link, pack

_MAX_CONCURRENT = 64
"""Maximum number of commands that run concurrently on a server of a cluster."""


class SingleServer:
    """A server, or the primary that Sentinels name. All commands share one connection, which `connect` opens;
    those of one turn of the event loop are sent in one write."""

    cluster = False

    def __init__(self, connect: Callable[[], Awaitable[Link]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._connect = connect
        self._decoders = cast(dict[Argument, Decoder], dict(Redis(protocol=2).response_callbacks))
        self._link: Link | None = None
        self._queue: list[Command] = []
        self._flushing = False
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False

    def execute_command(self, *command: Argument) -> asyncio.Future[Any]:
        reply: asyncio.Future[Any] = self._loop.create_future()
        try:
            packed = pack(command)
        except Exception as error:
            reply.set_exception(error)
            return reply
        self._queue.append(Command(packed, reply, self._decoders.get(command[0])))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return reply

    async def info(self) -> list[dict[str, Any]]:
        """The server's answer to INFO."""
        return [await self.execute_command("INFO")]

    async def aclose(self) -> None:
        self._closed = True
        self._fail_queue(NotSentError("closed"))
        await stop(self._connecting)
        if self._link is not None:
            self._link.close(errors.ConnectionError("closed"))
            await self._link.lost

    def _flush(self) -> None:
        """Sends the queued commands, or connects first."""
        self._flushing = False
        if self._closed:
            self._fail_queue(NotSentError("closed"))
        elif self._link is not None and self._link.usable:
            queue, self._queue = self._queue, []
            # A caller whose deadline has passed needs no reply; the command will be repeated if needed.
            self._link.send([command for command in queue if not command.reply.done()])
        elif self._connecting is None:
            self._connecting = self._loop.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        try:
            self._link = await self._connect()
        except Exception as error:
            self._fail_queue(NotSentError(str(error) or type(error).__name__), error)
        finally:
            self._connecting = None
        if self._queue:
            self._flush()

    def _fail_queue(self, error: Exception, cause: Exception | None = None) -> None:
        error.__cause__ = cause
        queue, self._queue = self._queue, []
        for command in queue:
            fail(command.reply, error)


class Cluster:
    """The servers of a cluster. Each command goes to the server that has its key."""

    cluster = True

    def __init__(self, redis: RedisCluster) -> None:
        self._redis = redis
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_MAX_CONCURRENT)
        )
        """By server: the commands to one that hangs must not take the slots of others."""
        self._running: set[asyncio.Task[None]] = set()

    def execute_command(self, *command: Argument) -> asyncio.Future[Any]:
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(self._execute(command, reply))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return reply

    async def info(self) -> list[dict[str, Any]]:
        """The primaries' answers to INFO."""
        found = await self._redis.info(target_nodes=RedisCluster.PRIMARIES)
        return [found] if "redis_version" in found else list(found.values())

    async def aclose(self) -> None:
        await self._redis.aclose()

    async def _execute(self, command: tuple[Argument, ...], reply: asyncio.Future[Any]) -> None:
        async with self._slots[self._server_of(command)]:
            if reply.done():
                return
            try:
                resolve(reply, await self._redis.execute_command(*command))
            except Exception as error:
                fail(reply, error)

    def _server_of(self, command: tuple[Argument, ...]) -> str:
        """The name of the server that has the first key of a command; empty while it is not known."""
        key = command[3] if command[0] in ("EVALSHA", "EVAL") else command[1]
        try:
            node = self._redis.get_node_from_key(str(key))
        except errors.RedisClusterException:
            return ""
        return "" if node is None else str(node.name)
