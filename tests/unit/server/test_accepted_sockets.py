"""The connections that this process has accepted on a port are listed, counted and disconnected."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pomelo.server.accepted_sockets import AcceptedSocket, AcceptedSockets


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_only_accepted_connections_of_the_port_are_listed_with_their_bytes(listener: socket.socket) -> None:
    sockets = AcceptedSockets(listener.getsockname()[1])
    assert list(sockets.list()) == []
    with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as accepted:
        host, port = client.getsockname()
        (found,) = sockets.list()
        assert (found.host, found.peer) == (host, f"ipv4:{host}:{port}")
        assert (found.descriptor, found.received) == (accepted.fileno(), 0)
        client.sendall(b"x" * 1_000)
        assert len(accepted.recv(1_000, socket.MSG_WAITALL)) == 1_000
        assert list(sockets.list()) == [found], "the same object"
        assert found.received == 1_000
        assert list(AcceptedSockets(1).list()) == []
    assert list(sockets.list()) == []


def test_a_disconnected_peer_is_reset_and_a_reused_descriptor_is_not_disconnected(
    listener: socket.socket,
) -> None:
    sockets = AcceptedSockets(listener.getsockname()[1])
    with socket.create_connection(listener.getsockname()) as client, listener.accept()[0]:
        (found,) = sockets.list()
        assert sockets.disconnect(found)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert not sockets.disconnect(found)
    with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as accepted:
        found.descriptor = accepted.fileno()
        assert not sockets.disconnect(found)
        client.sendall(b"x")
        assert accepted.recv(1) == b"x"


def test_a_descriptor_that_became_that_of_a_file_is_left_alone(listener: socket.socket) -> None:
    sockets = AcceptedSockets(listener.getsockname()[1])
    with (
        socket.create_connection(listener.getsockname()),
        listener.accept()[0],
        Path(__file__).open() as file,
    ):
        (found,) = sockets.list()
        found.descriptor = file.fileno()
        before = len([*Path("/proc/self/fd").iterdir()])
        assert not sockets.disconnect(found)
        assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_a_connection_that_is_ended_delivers_what_was_sent(listener: socket.socket) -> None:
    sockets = AcceptedSockets(listener.getsockname()[1])
    with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as accepted:
        client.settimeout(20)
        (found,) = sockets.list()
        accepted.sendall(b"last")
        sockets.end(found)
        assert client.recv(10) == b"last"
        assert client.recv(10) == b""
        client.sendall(b"more")
        assert accepted.recv(10) == b"more"
    sockets.end(found)


def test_the_next_connection_with_a_descriptor_is_listed_as_a_new_one(listener: socket.socket) -> None:
    sockets = AcceptedSockets(listener.getsockname()[1])
    with socket.create_connection(listener.getsockname()), listener.accept()[0] as first:
        (before,) = sockets.list()
        with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as second:
            os.dup2(second.fileno(), first.fileno())
            second.close()
            (after,) = sockets.list()
            assert after is not before
            assert (after.descriptor, after.peer) == (
                before.descriptor,
                f"ipv4:127.0.0.1:{client.getsockname()[1]}",
            )
            assert not sockets.disconnect(before)
            assert list(sockets.list()) == [after]


@pytest.mark.parametrize(
    ("name", "host", "peer"),
    [
        (("192.0.2.1", 5, 0, 0), "192.0.2.1", "ipv4:192.0.2.1:5"),
        (("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1", "ipv4:192.0.2.1:5"),
        (("2001:db8::1", 5, 0, 0), "2001:db8::1", "ipv6:%5B2001:db8::1%5D:5"),
        (("fe80::1", 5, 0, 2), "fe80::1", "ipv6:%5Bfe80::1%252%5D:5"),
    ],
)
def test_a_peer_is_named_as_grpc_names_it(name: tuple[str, int, int, int], host: str, peer: str) -> None:
    found = AcceptedSocket(3, 7, name)
    assert (found.host, found.peer) == (host, peer)
