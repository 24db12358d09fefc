"""Connections whose callers do not read the responses of calls that have ended."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from pomelo.server import connection_guard
from pomelo.server.accepted_sockets import AcceptedSocket
from tests.unit.server.guard_rig import Guarded, Kernel


def respond(guarded: Guarded, connection: AcceptedSocket) -> None:
    """Ends a call except for the rest of its response."""
    guarded.call(connection)
    guarded.guard.sending(connection.peer)


def wait(guarded: Guarded, seconds: int) -> None:
    """Scans once a second."""
    for _ in range(seconds):
        guarded.scan(1.0)


def send(guarded: Guarded, connection: AcceptedSocket, seconds: int, size: int) -> None:
    """Scans once a second, each time after `size` more bytes were sent."""
    for _ in range(seconds):
        connection.sent += size
        guarded.scan(1.0)


async def test_a_connection_of_which_nothing_was_read_for_a_minute_is_closed(guarded: Guarded) -> None:
    connection, other = guarded.connect(calls=0), guarded.connect(calls=0)
    respond(guarded, connection)
    wait(guarded, 60)
    assert not guarded.closed
    wait(guarded, 2)
    assert guarded.closed == [connection]
    assert other.peer != connection.peer


async def test_a_caller_who_reads_slowly_is_not_cut(guarded: Guarded) -> None:
    connection = guarded.connect(calls=0)
    respond(guarded, connection)
    send(guarded, connection, 600, 100)
    assert not guarded.closed


async def test_pings_are_not_taken_for_reading(guarded: Guarded) -> None:
    connection = guarded.connect(calls=0)
    respond(guarded, connection)
    send(guarded, connection, 62, 17)
    assert guarded.closed == [connection]


async def test_a_connection_with_running_calls_is_not_closed_because_of_one_response(
    guarded: Guarded,
) -> None:
    connection = guarded.connect(calls=1)
    respond(guarded, connection)
    wait(guarded, 600)
    assert not guarded.closed
    guarded.guard.ended(connection.peer)
    wait(guarded, 60)
    assert not guarded.closed
    wait(guarded, 2)
    assert guarded.closed == [connection]


async def test_a_response_that_was_read_at_last_no_longer_counts(guarded: Guarded) -> None:
    connection = guarded.connect(calls=0)
    respond(guarded, connection)
    wait(guarded, 59)
    guarded.guard.sent(connection.peer)
    wait(guarded, 600)
    guarded.guard.sent(connection.peer)  # is ignored
    respond(guarded, connection)
    wait(guarded, 60)
    assert not guarded.closed


async def test_one_of_two_responses_that_is_not_read_closes_the_connection(guarded: Guarded) -> None:
    connection = guarded.connect(calls=0)
    for _ in range(2):
        respond(guarded, connection)
    guarded.guard.sent(connection.peer)
    wait(guarded, 62)
    assert guarded.closed == [connection]


async def test_a_caller_without_a_key_may_leave_few_responses_unread(guarded: Guarded) -> None:
    guarded.limit(unauthenticated_resets=3)
    connection, authenticated = guarded.connect(), guarded.connect(calls=0)
    for each in (connection, authenticated):
        for _ in range(3):
            guarded.guard.sending(each.peer)
    guarded.scan()
    assert not guarded.closed
    for each in (connection, authenticated):
        guarded.guard.sending(each.peer)
    guarded.scan()
    assert guarded.closed == [connection]


async def test_unread_responses_do_not_close_the_connection_of_a_proxy(guarded: Guarded) -> None:
    guarded.limit(trusted=(ip_network("192.0.2.0/24"),))
    connection = guarded.connect(calls=0)
    respond(guarded, connection)
    wait(guarded, 600)
    assert not guarded.closed


async def test_nothing_is_kept_of_a_connection_that_has_ended(guarded: Guarded) -> None:
    connection = guarded.connect(calls=0)
    assert connection.peer in guarded.guard._calls
    guarded.kernel.sockets.remove(connection)
    guarded.scan()
    assert connection.peer not in guarded.guard._calls


async def test_connections_that_were_closed_just_before_the_end_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(connection_guard, "AcceptedSockets", lambda port: kernel)
    guarded = Guarded(kernel)
    guarded.limit(unauthenticated_resets=0)
    async with guarded.guard.watch(1):
        for host in ("192.0.2.1", "192.0.2.2"):
            guarded.guard.reset(guarded.connect(host).peer)
            guarded.scan(0.0)
        assert len(caplog.records) == 1  # at most one in ten seconds
    assert caplog.messages[-1].endswith("1, from 192.0.2.2")
