"""One open connection to a Redis server, which many callers share: commands are written without waiting for
the replies of earlier ones, and each reply is handed over as soon as it arrives."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from hiredis import Reader, pack_command
from redis import exceptions as errors
from redis.asyncio.connection import DefaultParser

from pomelo.runtime.process import fail
from pomelo.stores.redis.connection import Argument

_INCOMPLETE = object()

_SCRIPT_ERROR = re.compile(r"ERR Error running script .*?: -([A-Z]+ .*)")

_TICKS = 3
"""How often the watchdog looks within the timeout. Looks are counted, not seconds: while the event loop of
this process is late, replies may be waiting to be read."""

Decoder = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Login:
    """How a connection is set up: TLS, user, password and number of the database. `timeout` is how many
    seconds it may take to connect, and how long the server may then be silent while it owes a reply (a third
    longer at most)."""

    timeout: float
    tls: ssl.SSLContext | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0

    def commands(self) -> list[tuple[Argument, ...]]:
        """The first commands of the connection."""
        commands: list[tuple[Argument, ...]] = []
        if self.user is not None:
            commands.append(("AUTH", self.user, self.password or ""))
        elif self.password is not None:
            commands.append(("AUTH", self.password))
        if self.db:
            commands.append(("SELECT", self.db))
        return commands


pack = cast(Callable[[tuple[Argument, ...]], bytes], pack_command)
"""Returns the bytes of a command in the protocol of Redis."""


class Command(NamedTuple):
    """A command as it is sent, the future of its reply, and the decoder of the reply, if it needs one."""

    packed: bytes
    reply: asyncio.Future[Any]
    decode: Decoder | None = None


class Link(asyncio.Protocol):
    """A connection. Its server answers in the order of the commands."""

    def __init__(self, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._tick = timeout / _TICKS
        self._reader = Reader(
            protocolError=errors.InvalidResponse,
            replyError=_parse_error,
            notEnoughData=_INCOMPLETE,
        )
        self._sent: deque[Command] = deque()
        """The commands without a reply, in order."""
        self._transport: asyncio.Transport | None = None
        self.tcp: asyncio.Transport | None = None
        """The transport below TLS, which TLS passes a command to as a whole; None without TLS."""
        self._retired = False
        self._silent = 0
        """How often the watchdog has looked, while the server owed a reply, since it last sent or read
        something."""
        self._unsent = 0
        """The bytes that waited to be sent when the watchdog looked last."""
        self._watchdog: asyncio.TimerHandle | None = None
        self.lost = self._loop.create_future()
        """Done when the connection is closed."""

    @property
    def usable(self) -> bool:
        """Whether commands can be sent."""
        return self._transport is not None and not self._retired and not self._transport.is_closing()

    def send(self, commands: Iterable[Command]) -> None:
        """Sends commands in one write."""
        self._sent += commands
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(self._tick, self._watch)
        assert self._transport is not None
        try:
            self._transport.write(b"".join([command.packed for command in commands]))
        except Exception as error:
            self.close(error)

    def close(self, error: Exception) -> None:
        """Closes the connection. Commands without a reply fail with this error."""
        self._retired = True
        sent, self._sent = self._sent, deque()
        for command in sent:
            fail(command.reply, error)
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # of uvloop, it is not a subclass

    def data_received(self, data: bytes) -> None:
        self._silent = 0
        reader, sent = self._reader, self._sent
        try:
            reader.feed(data)
            while (value := reader.gets()) is not _INCOMPLETE:
                self._reply(sent.popleft(), value)
        except Exception as error:  # the server does not speak its protocol: no later reply can be trusted
            self.close(error)
        if self._retired and not self._sent and self._transport is not None:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.close(errors.ConnectionError(str(error) if error else "Connection closed by server."))
        if not self.lost.done():
            self.lost.set_result(None)

    def _reply(self, command: Command, value: Any) -> None:
        _, reply, decode = command
        if isinstance(value, Exception):
            # The server has become a replica, and its name may now lead to another server.
            self._retired = self._retired or isinstance(value, errors.ReadOnlyError)
            if not reply.done():
                reply.set_exception(value)
        elif not reply.done():
            try:
                reply.set_result(value if decode is None else decode(value))
            except Exception as error:
                reply.set_exception(error)
                raise

    def _watch(self) -> None:
        """Closes the connection if the server owes a reply and has been silent for the timeout."""
        self._watchdog = None
        if not self._sent:
            return
        transports = [each for each in (self._transport, self.tcp) if each is not None]
        before, self._unsent = self._unsent, sum(each.get_write_buffer_size() for each in transports)
        # A server that reads a large command over a slow network is not silent.
        self._silent = 0 if self._unsent < before else self._silent + 1
        if self._silent > _TICKS:
            self.close(errors.TimeoutError("Timeout reading from the server"))
        else:
            self._watchdog = self._loop.call_later(self._tick, self._watch)


def _parse_error(text: str) -> Exception:
    """The error of a reply. In Redis 6.2, that of a script's command is inside another text."""
    inner = _SCRIPT_ERROR.match(text)
    error: Exception = DefaultParser.parse_error(text if inner is None else inner[1])  # type: ignore[no-untyped-call]
    return error


async def open_link(address: tuple[str, int], login: Login) -> Link:
    """Connects to a server and logs in.

    Raises:
        OSError, RedisError: the server can't be reached, or refuses the login.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(login.timeout):
            tcp, link = await loop.create_connection(lambda: Link(login.timeout), *address)
            if login.tls is not None:
                await _start_tls(tcp, link, login.tls, address[0])
    except TimeoutError as error:
        raise errors.TimeoutError("Timeout connecting to the server") from error
    commands = [Command(pack(command), loop.create_future()) for command in login.commands()]
    try:
        if commands:
            link.send(commands)
        await asyncio.gather(*[command.reply for command in commands])
    except BaseException:
        link.close(errors.ConnectionError("closed"))
        raise
    return link


async def _start_tls(tcp: asyncio.Transport, link: Link, context: ssl.SSLContext, host: str) -> None:
    try:
        tls = await asyncio.get_running_loop().start_tls(tcp, link, context, server_hostname=host)
        if tls is None:
            raise ConnectionResetError("Connection closed by server.")
    except BaseException:
        tcp.abort()
        raise
    link.tcp = tcp
    link.connection_made(tls)
