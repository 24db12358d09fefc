"""The limits in docs/protection.md are those of the gRPC server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pomelo.call import DEFAULT_TIMEOUT
from pomelo.engine.idempotency import REPLAY_RATE
from pomelo.runtime.in_flight import LARGE_RESPONSE, MIB, InFlightLimits
from pomelo.server.call_limits import CallLimits
from pomelo.server.connection_limits import ConnectionLimits
from pomelo.server.field_limit import MAX_FIELDS, SMALL_MESSAGE
from pomelo.server.server import ServerOptions

PAGE = (Path(__file__).parents[2] / "docs" / "protection.md").read_text()
KIB = 1024
CALLS, CONNECTIONS, IN_FLIGHT = CallLimits(), ConnectionLimits(), InFlightLimits()


@pytest.mark.parametrize(
    ("what", "numbers"),
    [
        ("calls without a key", [CALLS.unauthenticated, CALLS.unauthenticated_time, SMALL_MESSAGE / KIB]),
        (f"responses above {LARGE_RESPONSE // KIB} KiB that", [IN_FLIGHT.account_unread / MIB]),
        ("the same of all accounts", [IN_FLIGHT.unread / MIB]),
        ("replays of an account that have", [REPLAY_RATE / MIB]),
        ("duration of any call", [DEFAULT_TIMEOUT]),
        ("messages that an account sends", [CALLS.reads, CALLS.uploads]),
        ("time to receive a message", [CALLS.read_time, CALLS.chunk_time]),
        ("time that a caller may take to read a message", [CALLS.unread_time]),
        ("size of a message", [CALLS.message / MIB, MAX_FIELDS]),
        ("messages in memory", [IN_FLIGHT.account_bytes / MIB, IN_FLIGHT.bytes / MIB]),
        ("connections without a good key", [CONNECTIONS.per_address, CONNECTIONS.grace]),
        ("time until a connection", [CONNECTIONS.key_timeout]),
        ("bytes received on a connection without", [CONNECTIONS.unauthenticated_bytes / KIB]),
        ("all connections", [CONNECTIONS.connections]),
        (
            "calls on one connection that are cancelled",
            [CONNECTIONS.resets, CONNECTIONS.reset_window, CONNECTIONS.unauthenticated_resets],
        ),
        ("time in which a caller without a running call reads", [CONNECTIONS.unread_time]),
        (
            "frames that belong to no call",
            [
                CONNECTIONS.idle_bytes / KIB,
                CONNECTIONS.unexplained / MIB,
                CONNECTIONS.unexplained_rate / MIB,
            ],
        ),
    ],
)
def test_a_row_has_the_numbers_of_the_server(what: str, numbers: list[float]) -> None:
    (limit,) = re.findall(rf"^\| {what}[^|]*\| ([^|]*) \|$", PAGE, re.MULTILINE)
    assert [int(each.replace(",", "")) for each in re.findall(r"\d[\d,]*", limit)] == numbers


def test_the_text_has_the_numbers_of_the_server() -> None:
    options = ServerOptions()
    channel = dict(options.channel_args())
    text = " ".join(PAGE.split())
    for sentence in (
        f"A connection takes {options.connection_streams:,} concurrent calls",
        f"reconnect after {channel['grpc.max_connection_idle_ms'] // 1000} seconds without a call",
        f"and after {channel['grpc.max_connection_age_ms'] // 60_000} minutes in any case",
        f"may then continue for {channel['grpc.max_connection_age_grace_ms'] // 60_000} minutes",
    ):
        assert sentence in text
