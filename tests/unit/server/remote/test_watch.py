"""The log lines of a gateway whose server becomes unavailable and available again."""

from __future__ import annotations

import logging

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from pomelo.errors import TABLE, PomeloError
from pomelo.server.remote.watch import RECOVERY_TIME, ServerWatch
from pomelo.status import from_rpc_error
from tests.unit.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock, caplog: pytest.LogCaptureFixture) -> ServerWatch:
    caplog.set_level(logging.INFO)
    return ServerWatch("server.example:50051", clock)


def unavailable(details: str) -> PomeloError:
    """Returns the error of a call to an unavailable server."""
    try:
        try:
            raise AioRpcError(StatusCode.UNAVAILABLE, Metadata(), Metadata(), details=details)
        except AioRpcError as error:
            raise from_rpc_error(error) from None
    except PomeloError as error:
        return error


REFUSED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:1: Connection refused"


def test_one_line_is_logged_when_the_server_is_lost_and_one_when_it_is_reconnected(
    watch: ServerWatch, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watch.call_ended(None)
    for _ in range(100):
        watch.call_ended(unavailable(REFUSED))
        clock.now += 0.1
    clock.now += 2.0
    for _ in range(100):
        watch.call_ended(None)
    assert [(record.levelname, record.name) for record in caplog.records] == [
        ("WARNING", "pomelo.gateway"),
        ("INFO", "pomelo.gateway"),
    ]
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("The server at server.example:50051 is lost: it refuses connections.")
    assert second == "The server at server.example:50051 is back after 12 s"


@pytest.mark.parametrize(("pause", "lines"), [(RECOVERY_TIME - 0.1, 1), (RECOVERY_TIME, 2)])
def test_the_server_is_back_from_exactly_the_recovery_time(
    watch: ServerWatch, clock: Clock, caplog: pytest.LogCaptureFixture, pause: float, lines: int
) -> None:
    watch.call_ended(unavailable(REFUSED))
    clock.now += pause
    watch.call_ended(None)
    assert len(caplog.records) == lines


def test_intermittent_failures_do_not_fill_the_log(
    watch: ServerWatch, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(500):
        watch.call_ended(unavailable(REFUSED))
        watch.call_ended(None)
        clock.now += 0.5
    assert len(caplog.records) == 1


@pytest.mark.parametrize("code", sorted(set(TABLE) - {"server_unavailable"}))
def test_an_error_of_the_server_shows_that_it_is_available(
    code: str, watch: ServerWatch, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watch.call_ended(unavailable(REFUSED))
    clock.now += 5.0
    watch.call_ended(PomeloError(code))
    assert (len(caplog.records) == 2) == (code not in ("deadline_exceeded", "shutting_down"))


def test_a_caller_who_leaves_does_not_change_the_state(
    watch: ServerWatch, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watch.call_ended(unavailable(REFUSED))
    clock.now += 5.0
    watch.call_ended(KeyboardInterrupt())
    watch.call_ended(GeneratorExit())
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        (REFUSED, "it refuses connections"),
        ("DNS resolution failed for secret.example", "its name can't be resolved"),
        (
            "errors resolving none.invalid:50051: [field:hostname lookup error:address lookup failed for "
            "none.invalid:50051: Domain name not found]",
            "its name can't be resolved",
        ),
        ("Socket closed", "it closed the connection"),
        ("recvmsg:Connection reset by peer", "it closed the connection"),
        ("Ssl handshake failed: SSL_ERROR_SSL: certificate verify failed", "the TLS handshake fails"),
        ("FD Shutdown: ping timeout", "it does not answer"),
        ("authorization: Bearer pml_live_x", "unavailable"),
        ("", "unavailable"),
    ],
)
def test_the_reason_does_not_quote_the_error(
    details: str, reason: str, watch: ServerWatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch.call_ended(unavailable(details))
    (record,) = caplog.records
    assert f"is lost: {reason}. " in record.getMessage()
    assert "example/" not in record.getMessage()
    assert "pml_" not in record.getMessage()


def test_an_error_without_a_cause_is_logged(watch: ServerWatch, caplog: pytest.LogCaptureFixture) -> None:
    watch.call_ended(PomeloError("server_unavailable"))
    assert "is lost: unavailable" in caplog.text
