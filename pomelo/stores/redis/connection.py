"""The connection to the server: commands with timeouts and retries, and scripts by their digests.

A command with an unknown outcome is sent again: every command that the store sends can be repeated. So is a
command that failed with an unexpected error; callers of the store never receive such an error as it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from redis import exceptions as errors

from pomelo.errors import PomeloError
from pomelo.runtime.logs import UnexpectedErrors
from pomelo.stores.accounts import PAGE
from pomelo.stores.base import DECLARED_ERRORS
from pomelo.stores.ledger import REPLAY_SECONDS, UnknownOutcomeError
from pomelo.stores.redis.scripts import Script

log = logging.getLogger("pomelo.stores")

Argument = str | bytes | int

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """All intervals of the store, in seconds. `timeout` limits all attempts of one call, `attempt_timeout`
    each attempt. A worker sends a heartbeat every `heartbeat`, and is considered dead after `dead_after`
    without one. Usage records are moved to the archive every `drain`. Opening waits up to `open` for a busy
    server, closing up to `close` for running work. `answer_ttl` and `tombstone_ttl` are how long an answer
    and the end of a task are remembered; `void_ttl`, the end of one that has not begun, which only a late
    reservation needs."""

    timeout: float = 0.9
    attempt_timeout: float = 0.3
    heartbeat: float = 3.0
    dead_after: float = 20.0
    drain: float = 1.0
    open: float = 10.0
    close: float = 5.0
    answer_ttl: float = REPLAY_SECONDS
    tombstone_ttl: float = 24 * 3600.0
    void_ttl: float = 600.0


class RefusedError(PomeloError):
    """store_unavailable: the server refused a command, and would refuse it again."""


_deadline: ContextVar[float] = ContextVar("_deadline", default=0.0)
"""When the current call must have ended; 0: no call has started."""


class Attempt(NamedTuple):
    """A command that was sent once, and the reply. `script`: the command runs it."""

    reply: asyncio.Future[Any]
    deadline: float
    command: tuple[Argument, ...]
    script: Script | None = None


class NotSentError(errors.ConnectionError):
    """A command was not sent, because there is no connection."""


class Client(Protocol):
    """The connections to one server or a cluster. In a cluster, all keys of a command have the same hash
    tag."""

    cluster: bool

    def execute_command(self, *command: Argument) -> asyncio.Future[Any]:
        """Starts to send a command. The future gets its reply; once it is done otherwise, the reply is
        dropped."""
        ...

    async def aclose(self) -> None:
        """Closes all connections."""
        ...


_TRANSIENT = (
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
"""Expected errors that may disappear soon."""

REPORT_TIMEOUT = 10.0
"""Timeout of each step of a report after the first one, which has shown that the server is reachable. There
may be many steps, and the server may be busy."""

_WAIT_INITIAL = 0.02
_WAIT_MAX = 0.15
_LOG_INTERVAL = 5.0
_TICK = 0.03
"""Seconds between two checks of all deadlines. A command may exceed its deadline by two of them."""


class Connection:
    """Sends commands and scripts, and retries them. Closes `client` when it is closed. `server_time` replaces
    the server's clock in tests."""

    def __init__(
        self, client: Client, timing: Timing, server_time: Callable[[], float] | None = None
    ) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._server_time = server_time
        self.timing = timing
        self.unexpected = UnexpectedErrors(log)
        self.cluster = client.cluster
        self.closed = False
        self._logged = -_LOG_INTERVAL
        self._lost_at: float | None = None
        """When the log said first that the server can't be reached; None if it can."""
        self._replies: list[tuple[float, asyncio.Future[Any]]] = []
        """The replies of commands, with their deadlines. Those that are done stay until the next check."""
        self._overdue: list[asyncio.Future[Any]] = []
        """The replies whose deadlines had passed at the last check."""
        self._check: asyncio.TimerHandle | None = None

    @contextmanager
    def one_deadline(self, timeout: float = 0.0, attempt: Attempt | None = None) -> Iterator[None]:
        """All commands sent inside share one deadline: that of the enclosing call or of `attempt`, or else
        `timeout` seconds from now (0: the usual timeout)."""
        deadline = _deadline.get() or (attempt.deadline if attempt is not None else 0.0)
        token = _deadline.set(
            deadline or asyncio.get_running_loop().time() + (timeout or self.timing.timeout)
        )
        try:
            yield
        finally:
            _deadline.reset(token)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Translates an unexpected error to UnknownOutcomeError, and logs it with its traceback."""
        try:
            yield
        except DECLARED_ERRORS:
            raise
        except Exception as error:
            self.unexpected.log("The store on Redis failed", error)
            raise UnknownOutcomeError("store_unavailable") from error

    def start(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Attempt:
        """Sends a script at the end of this turn of the event loop. `finish` returns its reply."""
        time: Argument = "" if self._server_time is None else round(self._server_time() * 1e6)
        tail = (time,) if script.timed else ()
        return self._start(("EVALSHA", script.digest, len(keys), *keys, *args, *tail), script)

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Runs a script.

        Raises:
            PomeloError: store_unavailable; UnknownOutcomeError if the script may have run.
        """
        return await self.finish(self.start(script, keys, args))

    async def send(self, *command: Argument) -> Any:
        """Sends a command. In a cluster it must have one key.

        Raises:
            PomeloError: store_unavailable; UnknownOutcomeError if the command may have been executed.
        """
        return await self.finish(self._start(command))

    async def finish(self, attempt: Attempt) -> Any:
        """The reply to a command, which is sent again after most errors. Sends the text of a script whose
        digest the server does not know.

        Raises:
            PomeloError: store_unavailable; UnknownOutcomeError if the command may have been executed.
        """
        loop = self._loop
        reply, deadline, command, script = attempt
        wait = _WAIT_INITIAL
        unknown = False
        while True:
            try:
                value = await reply
                if self._lost_at is not None:
                    log.warning("Redis is back after %.1f s", loop.time() - self._lost_at)
                    self._lost_at = None
                return value
            except errors.NoScriptError:
                if script is not None:
                    command = ("EVAL", script.text, *command[2:])
                reply = self._send(command, deadline)
                continue
            except _TRANSIENT as error:
                reason: Exception = error
            except errors.ResponseError as error:
                log.warning("Redis refused a command: %s", error)
                raise (_failure(unknown) if unknown else RefusedError("store_unavailable")) from error
            except Exception as error:
                # The connection is in an unknown state; the command may work on another connection.
                if not is_closed_transport(error):
                    self.unexpected.log("The client of Redis failed", error)
                reason = error
            unknown = unknown or _may_be_executed(reason)
            if self.closed:
                raise _failure(unknown) from reason
            if loop.time() + wait >= deadline:
                self._log_outage(reason, loop.time())
                raise _failure(unknown) from reason
            await asyncio.sleep(wait)
            wait = min(2 * wait, _WAIT_MAX)
            reply = self._send(command, deadline)

    def _start(self, command: tuple[Argument, ...], script: Script | None = None) -> Attempt:
        deadline = _deadline.get() or self._loop.time() + self.timing.timeout
        return Attempt(self._send(command, deadline), deadline, command, script)

    def _send(self, command: tuple[Argument, ...], deadline: float) -> asyncio.Future[Any]:
        """Sends a command once. Its reply is a TimeoutError after the deadline."""
        reply = self._client.execute_command(*command)
        self._replies.append((deadline, reply))
        if self._check is None:
            self._check = self._loop.call_later(_TICK, self._check_deadlines)
        return reply

    def _check_deadlines(self) -> None:
        """Ends the replies that two checks found overdue. While the event loop was blocked, they could not be
        read; before the second check they can."""
        now = self._loop.time()
        for reply in self._overdue:
            if not reply.done():
                reply.set_exception(TimeoutError("Timeout waiting for the server"))
        waiting = [each for each in self._replies if not each[1].done()]
        self._replies = [each for each in waiting if each[0] > now]
        self._overdue = [reply for deadline, reply in waiting if deadline <= now]
        self._check = self._loop.call_later(_TICK, self._check_deadlines) if waiting else None

    def _log_outage(self, reason: Exception, now: float) -> None:
        # Every caller receives the error; the log needs it only once in a while.
        if now - self._logged > _LOG_INTERVAL:
            self._logged = now
            self._lost_at = now if self._lost_at is None else self._lost_at
            log.warning("Redis can't be reached: %s", str(reason) or type(reason).__name__)

    async def close(self) -> None:
        """Closes all connections. Later commands fail."""
        self.closed = True
        await self._client.aclose()


async def scan(connection: Connection, command: str, key: str) -> AsyncIterator[Any]:
    """Yields the members of a set (SSCAN) or the fields of a hash (HSCAN) in parts, in any order. All are
    yielded that exist during the whole scan, some twice."""
    cursor = 0
    while True:
        with connection.one_deadline(REPORT_TIMEOUT if cursor else 0.0):
            cursor, part = await connection.send(command, key, cursor, "COUNT", PAGE)
        if part:
            yield part
        if not cursor:
            return


class _Connected(Protocol):
    _connection: Connection


C = TypeVar("C", bound=_Connected)


def one_deadline(
    method: Callable[Concatenate[C, P], Awaitable[T]],
) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """Decorates a method: all its commands share the deadline of one call, and its errors are translated as
    with `translated_errors`."""

    @wraps(method)
    async def limited(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._connection.one_deadline(), self._connection.translated_errors():
            return await method(self, *args, **kwargs)

    return limited


def translated_errors(
    method: Callable[Concatenate[C, P], Awaitable[T]],
) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """Decorates a method: it raises the declared errors, and store_unavailable for all others."""

    @wraps(method)
    async def translated(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._connection.translated_errors():
            return await method(self, *args, **kwargs)

    return translated


def _failure(unknown: bool) -> PomeloError:
    return (UnknownOutcomeError if unknown else PomeloError)("store_unavailable")


def is_closed_transport(error: BaseException) -> bool:
    """Whether a connection was closed while redis-py used it: uvloop raises RuntimeError then."""
    return isinstance(error, RuntimeError) and "closed" in str(error)


def _may_be_executed(error: Exception) -> bool:
    """Whether the server may have executed a command that failed with this error. In doubt, yes."""
    if isinstance(error, (NotSentError, errors.BusyLoadingError, errors.ResponseError)):
        return False
    return "connecting to" not in str(error)
