"""nginx's configuration, without nginx: its limits beside Pomelo's, and that it sends no task twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pomelo.call import DEFAULT_TIMEOUT
from pomelo.server.server import CONNECTION_STREAMS
from pomelo.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
TEXT = (DEPLOY / "nginx" / "pomelo.conf").read_text()
UPSTREAMS = ("nginx/upstreams.conf", "compose/upstreams.conf")


def values(directive: str, text: str = TEXT) -> list[str]:
    """Returns what a directive is set to, wherever it is."""
    found = re.findall(rf"^ *{directive} (.+?);", text, re.MULTILINE)
    assert found, directive
    return found


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


@pytest.mark.parametrize(
    "directive",
    ["send_timeout", "proxy_read_timeout", "proxy_send_timeout", "grpc_read_timeout", "grpc_send_timeout"],
)
def test_no_time_limit_ends_a_task_that_pomelo_still_allows(directive: str) -> None:
    assert all(seconds(limit) > DEFAULT_TIMEOUT for limit in values(directive))


def test_a_request_that_may_have_reached_a_server_is_not_sent_to_another_one() -> None:
    for directive in ("proxy_next_upstream", "grpc_next_upstream"):
        assert values(directive) == ["error timeout"], "without non_idempotent, a POST is sent once"


@pytest.mark.parametrize("file", UPSTREAMS)
def test_nginx_closes_idle_connections_before_pomelo_does(file: str) -> None:
    rest, grpc = values("keepalive_timeout", (DEPLOY / file).read_text())
    assert Settings().idle_timeout is None, "75 s"
    assert seconds(rest) < 75
    assert seconds(grpc) < 300, "grpc.max_connection_idle_ms"


def test_pomelo_refuses_what_is_too_large_before_nginx_does() -> None:
    rest, grpc = values("client_max_body_size")
    assert int(rest.removesuffix("m")) * 2**20 > Settings().upload_limit
    assert grpc == "0", "no limit"


def test_nothing_is_held_back() -> None:
    """Server-sent events have a header that forbids it; audio and bodies do not."""
    for directive in ("proxy_buffering", "proxy_request_buffering", "gzip"):
        assert values(directive) == ["off"]


def test_a_connection_takes_as_many_grpc_calls_as_one_of_pomelos() -> None:
    assert values("http2_max_concurrent_streams") == [str(CONNECTION_STREAMS)]


def test_only_tls_without_known_weaknesses_is_spoken() -> None:
    assert values("ssl_protocols") == ["TLSv1.2 TLSv1.3"]
