"""The way to the server: commands with our own limits and retries, and scripts by their digests.

A command whose outcome is unknown is sent again: all commands sent here may be repeated. A command
that failed with an unexpected error is sent again, too; the store's callers never see such an error
as it is. The store's other modules send the commands; none of them knows how a connection is made
or lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from redis import exceptions as errors

from pomelo.errors import PomeloError
from pomelo.logs import UnexpectedErrors
from pomelo.stores.base import DECLARED_ERRORS
from pomelo.stores.ledger import PAGE, REPLAY_SECONDS, WINDOW, UnknownOutcomeError
from pomelo.stores.redis.scripts import Script

log = logging.getLogger("pomelo.stores")

Part = str | bytes | int

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """All intervals of the store, in seconds. `limit` is for all attempts of one call, `attempt` for each;
    an owner beats every `beat` and is taken for dead after standing still for `dead`; usage goes to the
    archive every `drain`; closing waits `close` for what is under way; a task's end is remembered for
    `remember`, an answer for `replay`."""

    limit: float = 0.9
    attempt: float = 0.3
    beat: float = 3.0
    dead: float = 20.0
    drain: float = 1.0
    close: float = 5.0
    window: float = WINDOW
    replay: float = REPLAY_SECONDS
    remember: float = 24 * 3600.0


class RefusedError(PomeloError):
    """store_unavailable: the server refused a command, and would refuse it again."""


_end: ContextVar[float] = ContextVar("_end", default=0.0)
"""When the limit of the call is over, of which this is a part."""


class Client(Protocol):
    """The part of redis-py that is used, for one server or a cluster. In a cluster, all keys of a
    command have the same hash tag."""

    cluster: bool

    async def execute_command(self, *command: Part) -> Any:
        """Sends a command and gives its answer."""
        ...

    async def aclose(self) -> None:
        """Closes all connections."""
        ...


_PASSING = (
    errors.ConnectionError,
    errors.TimeoutError,
    errors.BusyLoadingError,
    errors.ReadOnlyError,
    errors.ClusterDownError,
    errors.TryAgainError,
    errors.MasterDownError,
    errors.RedisClusterException,
    TimeoutError,
    OSError,
)
"""Expected errors that may be over in a moment."""

PATIENCE = 10.0
"""Seconds that a step of a report may take after the first, which has shown that the server is
reachable. There are very many steps, and the server may be busy."""

_PAUSE = 0.02
_LONGEST_PAUSE = 0.15
_TELL = 5.0


class Link:
    """See the module. `client` is closed with it. `server_time` stands for the server's clock in tests."""

    def __init__(
        self, client: Client, timing: Timing, server_time: Callable[[], float] | None = None
    ) -> None:
        self._client = client
        self._server_time = server_time
        self.timing = timing
        self.unexpected = UnexpectedErrors(log)
        self.cluster = client.cluster
        self.closed = False
        self._told = -_TELL

    @contextmanager
    def one_call(self, limit: float = 0.0) -> Iterator[None]:
        """Commands that are sent inside share one deadline: that of the enclosing call, or else
        `limit` seconds from now (0: the usual limit)."""
        token = _end.set(_end.get() or asyncio.get_running_loop().time() + (limit or self.timing.limit))
        try:
            yield
        finally:
            _end.reset(token)

    @contextmanager
    def contained(self) -> Iterator[None]:
        """Turns an unexpected error into UnknownOutcomeError, and logs it with its trace."""
        try:
            yield
        except DECLARED_ERRORS:
            raise
        except Exception as error:
            self.unexpected.log("The store on Redis failed", error)
            raise UnknownOutcomeError("store_unavailable") from error

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Part]) -> Any:
        """Runs a script. It is sent whole where the server doesn't know it (any more).

        Raises:
            PomeloError: store_unavailable; UnknownOutcomeError where it may have been run.
        """
        tail: tuple[Part, ...] = (len(keys), *keys, *args)
        if script.timed:
            tail += ("" if self._server_time is None else round(self._server_time() * 1e6),)
        return await self._try(("EVALSHA", script.digest, *tail), ("EVAL", script.text, *tail))

    async def send(self, *command: Part) -> Any:
        """Sends a command, of one key in a cluster.

        Raises:
            PomeloError: store_unavailable; UnknownOutcomeError where it may have been done.
        """
        return await self._try(command, command)

    async def _try(self, command: Sequence[Part], whole: Sequence[Part]) -> Any:
        loop = asyncio.get_running_loop()
        end = _end.get() or loop.time() + self.timing.limit
        pause = _PAUSE
        unknown = False
        while not self.closed:
            try:
                # Each attempt's own limit is the sockets'; what waits to be sent is none yet.
                async with asyncio.timeout_at(end):
                    return await self._client.execute_command(*command)
            except errors.NoScriptError:
                command = whole
                continue
            except _PASSING as error:
                reason: Exception = error
            except errors.ResponseError as error:
                log.warning("Redis refused a command: %s", error)
                raise (_failure(unknown) if unknown else RefusedError("store_unavailable")) from error
            except Exception as error:
                # The connection is in an unknown state; the same may work on another connection.
                if not is_closed_transport(error):
                    self.unexpected.log("The client of Redis failed", error)
                reason = error
            unknown = unknown or _may_be_done(reason)
            if loop.time() + pause >= end:
                self._tell(reason, loop.time())
                raise _failure(unknown) from reason
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise _failure(unknown)

    def _tell(self, reason: Exception, now: float) -> None:
        # All callers hear of it; the log needs it once.
        if now - self._told > _TELL:
            self._told = now
            log.warning("Redis can't be reached: %s", str(reason) or type(reason).__name__)

    async def close(self) -> None:
        """Closes all connections; what comes later is refused."""
        self.closed = True
        await self._client.aclose()


async def scanned(link: Link, table: str) -> AsyncIterator[dict[bytes, bytes]]:
    """Yields a hash in parts. Fields that change meanwhile may be missing or come twice."""
    cursor = 0
    while True:
        with link.one_call(PATIENCE if cursor else 0.0):
            cursor, part = await link.send("HSCAN", table, cursor, "COUNT", PAGE)
        if part:
            yield part
        if not cursor:
            return


class _Linked(Protocol):
    _link: Link


L = TypeVar("L", bound=_Linked)


def one_call(
    method: Callable[Concatenate[L, P], Awaitable[T]],
) -> Callable[Concatenate[L, P], Coroutine[Any, Any, T]]:
    """Makes a method send all its commands within the time limit of one call, and `contained`."""

    @wraps(method)
    async def limited(self: L, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._link.one_call(), self._link.contained():
            return await method(self, *args, **kwargs)

    return limited


def contained(
    method: Callable[Concatenate[L, P], Awaitable[T]],
) -> Callable[Concatenate[L, P], Coroutine[Any, Any, T]]:
    """Makes a method raise what its protocol declares, and store_unavailable for any other
    error."""

    @wraps(method)
    async def inside(self: L, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._link.contained():
            return await method(self, *args, **kwargs)

    return inside


def _failure(unknown: bool) -> PomeloError:
    return (UnknownOutcomeError if unknown else PomeloError)("store_unavailable")


def is_closed_transport(error: BaseException) -> bool:
    """Whether a connection was closed while redis-py used it: uvloop raises RuntimeError then."""
    return isinstance(error, RuntimeError) and "closed" in str(error)


def _may_be_done(error: Exception) -> bool:
    """Whether the server may have done what failed so. Where in doubt, it may."""
    if isinstance(error, (errors.BusyLoadingError, errors.ResponseError)):
        return False
    return "connecting to" not in str(error)
