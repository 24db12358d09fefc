"""The heads of requests: the request line, and fields that can't contain another line."""

from __future__ import annotations

import re
from base64 import b64encode

from yarl import URL

import pomelo
from pomelo.providers.http.protocol import Origin

_TARGET = re.compile(r"[\x21-\x7e]+")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")

_FRAMING = frozenset(("content-length", "transfer-encoding"))
"""Fields that only the client itself may add."""


def request_head(
    method: str, url: URL, headers: tuple[tuple[str, str], ...], keep: bool
) -> tuple[Origin, bytes]:
    """Return where a request is sent, and its head without the size of the body and the last empty line.
    `headers` replace the client's own. Unless `keep`, the server is asked to close the connection afterwards.

    Raises:
        ValueError: the URL or a header is invalid. The error does not contain it.
    """
    if url.scheme not in ("http", "https") or not url.raw_host or url.port is None:
        raise ValueError("not the URL of an HTTP server")
    fields = {
        "host": ("Host", url.host_port_subcomponent or ""),
        "accept-encoding": ("Accept-Encoding", "identity"),
        "user-agent": ("User-Agent", f"pomelo/{pomelo.__version__}"),
        "accept": ("Accept", "*/*"),
    }
    if method == "POST":
        fields["content-type"] = "Content-Type", "application/octet-stream"
    fields |= {name.lower(): (name, value) for name, value in headers}
    if url.raw_user is not None or url.raw_password is not None:
        if "authorization" in fields:
            raise ValueError("a URL with credentials, beside a header with others")
        credentials = b64encode(f"{url.user or ''}:{url.password or ''}".encode("latin-1"))
        fields["authorization"] = "Authorization", f"Basic {credentials.decode()}"
    if not keep:
        fields["connection"] = "Connection", "close"
    valid = _TARGET.fullmatch(url.raw_path_qs) and not _FRAMING & fields.keys()
    if not valid or not all(
        _NAME.fullmatch(name) and _VALUE.fullmatch(value) for name, value in fields.values()
    ):
        raise ValueError("an invalid header or path")
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.values())
    origin = Origin(url.raw_host, url.port, url.scheme == "https")
    return origin, f"{method} {url.raw_path_qs} HTTP/1.1\r\n{lines}".encode()
