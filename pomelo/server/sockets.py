"""Lists the TCP connections that this process has accepted on a port, and ends them, whoever owns them.

gRPC accepts connections in its own threads and does not expose them. Linux does: for every descriptor of the
process it reports whether it is such a connection and how much was transferred, and can disconnect it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress

_SO_COOKIE = 57
_TCP, _TCP_INFO = socket.IPPROTO_TCP, 11
_COUNTS = struct.Struct("=QQ")
_COUNTS_AT = 120
_INFO = 136
"""Where `struct tcp_info` has the bytes that the peer acknowledged and those received, and where they end."""
_UNSPECIFIED = struct.pack("=H14x", socket.AF_UNSPEC)


class AcceptedSocket:
    """One connection. `peer` is its other end as gRPC writes it, `host` that end's IP address; `received` and
    `sent` are bytes, as of the last time it was listed."""

    __slots__ = ("cookie", "descriptor", "host", "peer", "received", "sent")

    def __init__(self, descriptor: int, cookie: int, name: tuple[str, int, int, int]) -> None:
        self.descriptor = descriptor
        self.cookie = cookie
        host, port, _, scope = name
        if host.startswith("::ffff:") and "." in host:
            self.host = host.removeprefix("::ffff:")
            self.peer = f"ipv4:{self.host}:{port}"
        elif ":" in host:
            self.host = host
            self.peer = f"ipv6:%5B{host}{f'%25{scope}' if scope else ''}%5D:{port}"
        else:
            self.host = host
            self.peer = f"ipv4:{host}:{port}"
        self.received = 0
        self.sent = 0


class AcceptedSockets:
    """The connections that were accepted on any of `ports`.

    Raises:
        OSError: this system does not show them; Linux 4.6 or later does.
    """

    def __init__(self, ports: Collection[int]) -> None:
        if sys.platform != "linux":
            raise OSError("only Linux shows the connections of a process")
        self._ports = frozenset(ports)
        self._known: dict[int, tuple[int, AcceptedSocket | None]] = {}
        """Descriptor -> the cookie of its socket, and the connection if it is one of ours."""
        self._size = ctypes.c_uint32()
        self._cookie = ctypes.c_uint64()
        self._info = ctypes.create_string_buffer(_INFO)
        self._size_at, self._cookie_at = ctypes.byref(self._size), ctypes.byref(self._cookie)
        # PyDLL keeps the interpreter's lock: these calls are too short to be worth releasing it.
        self._libc = ctypes.PyDLL(None)
        self._getsockopt = self._libc.getsockopt
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            if not self._cookie_of(probe.fileno()) or not self._read_info(probe.fileno()):
                raise OSError("this kernel tells too little about connections")
        next(_descriptors(), None)

    def list(self) -> Iterator[AcceptedSocket]:
        """Every open connection; the same object as before for one that was open before. About 3 µs for each,
        and 1 µs for any other descriptor.

        Raises:
            OSError: no descriptor is free.
        """
        known: dict[int, tuple[int, AcceptedSocket | None]] = {}
        for descriptor in _descriptors():
            cookie = self._cookie_of(descriptor)
            if not cookie:
                continue  # not a socket, or closed by now
            found = self._known.get(descriptor)
            if found is None or found[0] != cookie:
                found = (cookie, self._examine(descriptor))
            known[descriptor] = found
            if found[1] is not None and self._read_info(descriptor):
                one = found[1]
                one.sent, one.received = _COUNTS.unpack_from(self._info, _COUNTS_AT)
                yield one
        self._known = known

    def disconnect(self, one: AcceptedSocket) -> bool:
        """Ends a connection as if the peer had reset it, and drops what it had sent. False if it has ended.

        Its owner still has to close the descriptor, and does so when it sees the end.

        Raises:
            OSError: no descriptor is free.
        """
        copy = _copy(one.descriptor)
        if copy is None:
            return False
        with copy:
            # The descriptor may have been reused by now. The copy still refers to the same socket.
            if self._cookie_of(copy.fileno()) != one.cookie:
                return False
            # Connecting to AF_UNSPEC disconnects. Unlike shutdown it drops queued data, which would cost its
            # owner time, and leaves no peer waiting.
            if self._libc.connect(copy.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)):
                with suppress(OSError):
                    copy.shutdown(socket.SHUT_RDWR)
            return True

    def _cookie_of(self, descriptor: int) -> int:
        """A number that no other socket ever has; 0 if it is not a socket."""
        self._size.value = 8
        if self._getsockopt(descriptor, socket.SOL_SOCKET, _SO_COOKIE, self._cookie_at, self._size_at):
            return 0
        return self._cookie.value

    def _read_info(self, descriptor: int) -> bool:
        """Reads the `tcp_info` of a connection; False if the kernel returns too little or nothing."""
        self._size.value = _INFO
        failed = self._getsockopt(descriptor, _TCP, _TCP_INFO, self._info, self._size_at)
        return not failed and self._size.value == _INFO

    def _examine(self, descriptor: int) -> AcceptedSocket | None:
        """The connection behind a descriptor, None if it was not accepted on one of `ports`."""
        copy = _copy(descriptor)
        if copy is None:
            return None
        with copy:
            try:
                if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.type != socket.SOCK_STREAM:
                    return None
                if copy.getsockname()[1] not in self._ports:
                    return None
                name = copy.getpeername()  # raises for a listener
            except OSError:
                return None
            cookie = copy.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
            return AcceptedSocket(descriptor, int.from_bytes(cookie, sys.byteorder), (*name, 0, 0)[:4])


def _descriptors() -> Iterator[int]:
    """Every descriptor that this process has open, as of now."""
    return map(int, os.listdir("/proc/self/fd"))  # noqa: PTH208 (paths would cost as much as all the rest)


def _copy(descriptor: int) -> socket.socket | None:
    """A copy of the socket behind a descriptor, None if it is closed or no socket.

    Raises:
        OSError: no descriptor is free.
    """
    try:
        copy = os.dup(descriptor)
    except OSError as error:
        if error.errno == errno.EBADF:
            return None
        raise
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
