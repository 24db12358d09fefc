"""Addresses, networks and origins are read as they are written, and refused if they are neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.network.addresses import (
    check_network,
    check_socket_path,
    host_of,
    is_fixed,
    is_here,
    is_loopback,
    join_address,
    normalize_origin,
    split_address,
    without_login,
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("localhost:0", "localhost", 0),
        ("pomelo.example:65535", "pomelo.example", 65535),
        ("[::1]:50051", "::1", 50051),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
    ],
)
def test_an_address_is_split_and_joined_again(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)
    assert join_address(host, port) == text


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "localhost:", ":80", "[]:80", "[::1]", "::1", "::1:80", "localhost:65536",
     "pomelo..example:80", ".localhost:80", f"{'x' * 64}:80",
     "localhost:-1", "localhost:+1", "localhost: 1", "localhost:٣", "localhost:²", "localhost:http"],
)  # fmt: skip
def test_a_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be host:port, such as 127\.0\.0\.1:8080$"):
        split_address(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("127.255.255.254", True), ("::1", True), ("0.0.0.0", False),
     ("::", False), ("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", False), ("10.0.0.1", False),
     ("128.0.0.1", False), ("localhost.example", False), ("", False)],
)  # fmt: skip
def test_only_this_machine_reaches_a_loopback_host(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_name_that_another_machine_looks_up_is_not_here() -> None:
    assert [is_here(f"dns://{server}/localhost:50051") for server in ("", "192.0.2.1")] == [True, False]
    assert is_here("unix:/run/pomelo.sock")
    assert is_here("unix-abstract:pomelo")


def test_the_path_of_a_socket_is_limited_as_a_whole_and_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left = 107 - len(f"{tmp_path}/")
    check_socket_path(Path("x" * left))
    for name in ("x" * (left + 1), "x" * (left - 1) + "\u00e9"):
        with pytest.raises(OSError, match="Use a data folder with a shorter path"):
            check_socket_path(Path(name))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("10.0.0.1", True), ("::1", True), ("fe80::1", True),
     ("localhost.example", False), ("127.0.0.1.example", False), ("1.2.3", False), ("pomelo", False), ("", False)],
)  # fmt: skip
def test_an_ip_address_and_localhost_are_fixed(host: str, expected: bool) -> None:
    assert is_fixed(host) is expected


@pytest.mark.parametrize(
    ("header", "host"),
    [("localhost:9090", "localhost"), ("LocalHost", "localhost"), ("[::1]:9090", "::1"), ("10.0.0.1", "10.0.0.1"),
     ("pomelo.example:80", "pomelo.example"), ("", ""), ("[", ""), (":80", ""), ("a:b", "")],
)  # fmt: skip
def test_the_host_of_a_header_has_no_port(header: str, host: str) -> None:
    assert host_of(header) == host


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*", "*"),
        ("https://app.example", "https://app.example"),
        ("HTTPS://App.Example", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("https://app.example:80", "https://app.example:80"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_an_origin_is_normalized_as_browsers_send_it(text: str, expected: str) -> None:
    assert normalize_origin(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "app.example", "https:app.example", "https://", "https://app.example/", "https://app.example/path",
     "https://app.example?a", "https://app.example#a", "https://user@app.example", "https://*.example",
     "https://app.example https://b.example", "https://app\\.example", "https://app.example\n",
     "https://app.example:port"],
)  # fmt: skip
def test_a_text_that_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be \* or origins, such as https://app\.example"):
        normalize_origin(text)


@pytest.mark.parametrize("text", ["10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "::1"])
def test_a_network_or_an_address_is_accepted_as_it_is(text: str) -> None:
    assert check_network(text) == text


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "localhost", "2001:db8::1/32"])
def test_a_text_that_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be an IP address or a network, such as 10\.0\.0\.0/8$"):
        check_network(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:1/0?password=secret", "redis://host:1/0"),
        ("redis://host/0", "redis://host/0"),
        ("https://a.example/path@5?x=//u@b", "https://a.example/path@5"),
        ("https://a@b@c/d", "https://c/d"),
    ],
)
def test_a_login_is_not_shown(url: str, shown: str) -> None:
    assert without_login(url) == shown
