"""Network addresses as text: host and port, loopback addresses, networks, and origins of web pages."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
from pathlib import Path

from yarl import URL

_MAX_SOCKET_PATH = 107
"""Bytes of the path of a Unix socket."""

_LOGIN = re.compile(r"//[^/?#]*@")


def split_address(text: str) -> tuple[str, int]:
    """Returns the host and the port of `host:port` or `[v6]:port`.

    Raises:
        ValueError: the text is neither.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or not _is_name(host):
        host = ""
    if not host or not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be host:port, such as 127.0.0.1:8080")
    return host, int(port)


def _is_name(host: str) -> bool:
    """Whether a host can be looked up; not if a part of its name is empty or too long."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def join_address(host: str, port: int) -> str:
    """Returns `host:port`, or `[v6]:port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address of `host`."""
    address = _ip_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def is_here(target: str) -> bool:
    """Whether a target of gRPC is on this machine: not a name that it lets another machine look up."""
    host = re.sub(r"^(dns|ipv4|ipv6):(///)?", "", target).rpartition(":")[0].strip("[]")
    return target.startswith(("unix:", "unix-abstract:")) or is_loopback(host)


def is_every_address(host: str) -> bool:
    """Whether a server on `host` listens on every address of its machine."""
    address = _ip_address(host)
    return address is not None and address.is_unspecified


def check_socket_path(path: Path) -> None:
    """Refuses the path of a Unix socket that is too long.

    Raises:
        OSError: it is.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise OSError(
            errno.ENAMETOOLONG, f"Too long for a socket: {path}. Use a data folder with a shorter path"
        )


def host_of(header: str) -> str:
    """Returns the host in a Host header, in lower case and without its port; empty if it has no host."""
    try:
        return URL(f"http://{header}").host or ""
    except ValueError:
        return ""


def is_fixed(host: str) -> bool:
    """Whether no DNS server decides which machine a host is: it is an IP address or `localhost`."""
    return host == "localhost" or _ip_address(host) is not None


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    # A socket for both families reports the addresses of IPv4 in this form.
    return getattr(address, "ipv4_mapped", None) or address


def without_login(url: str) -> str:
    """Returns a URL without user, password and query, which may be secret, for messages."""
    return _LOGIN.sub("//", url.partition("?")[0], count=1)


def normalize_origin(text: str) -> str:
    """Returns an origin in the form of browsers: lower case, ASCII, no default port. `*` stays as it is.

    Raises:
        ValueError: the text is not an origin.
    """
    if text == "*":
        return text
    try:
        if text.count("/") != 2 or set("?#@*\\ ") & set(text) or not text.isprintable():
            raise ValueError(text)
        return str(URL(text).origin())
    except ValueError:
        raise ValueError(
            "must be * or origins, such as https://app.example or http://localhost:3000: scheme, host and "
            "port, without a path or a slash at the end"
        ) from None


def check_network(text: str) -> str:
    """Returns the text of an IP address or network.

    Raises:
        ValueError: the text is neither.
    """
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError("must be an IP address or a network, such as 10.0.0.0/8") from error
    return text
