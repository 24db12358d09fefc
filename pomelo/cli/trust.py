"""TLS as the command line sees it: whom it trusts, and why a server that listens can't be talked to.

`client` asks before it opens a channel and after one failed, `doctor` for REST, `serve` for --ca. It knows
neither grpc nor tasks.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

from pomelo.cli.terminal import FailureError

_TIMEOUT = 5.0
"""Seconds that a handshake may take."""

_OTHER_NAME = (62, 64)
"""OpenSSL's codes for a certificate that is good, but of another host name or IP address."""

_ASKS = "it asks for a client certificate of its authority: set POMELO_TLS_CERT and POMELO_TLS_KEY"
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def authority(path: Path | None) -> ssl.SSLContext:
    """A context that trusts the authority of a PEM file (None: the well-known ones), and checks names.

    Raises:
        FailureError: the file holds no certificate.
    """
    try:
        return ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise FailureError(f"--ca {path} holds no PEM certificate") from None


def own_certificate(path: Path) -> str:
    """The first certificate of POMELO_TLS_CERT, the server's own, without those that vouch for it.

    Raises:
        FailureError: there is none; OSError: the file can't be read.
    """
    text = path.read_text(errors="replace")
    begin, end = text.find(_BEGIN), text.find(_END)
    if not 0 <= begin < end:
        raise FailureError(f"POMELO_TLS_CERT: {path} holds no PEM certificate")
    return text[begin : end + len(_END)] + "\n"


def own(path: Path) -> ssl.SSLContext:
    """A context that trusts the certificate of POMELO_TLS_CERT and no other, under whatever name it stands.

    Raises:
        FailureError: there is none; OSError: the file can't be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # One certificate is trusted, so its name adds nothing; the address may well be 127.0.0.1.
    context.check_hostname = False
    # Nobody above it is known: it need not be self-signed.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=own_certificate(path))
    except ssl.SSLError:
        raise FailureError(f"POMELO_TLS_CERT: {path} holds no PEM certificate") from None
    return context


def name_of(host: str, port: int, context: ssl.SSLContext) -> str | None:
    """The name in the certificate that the server shows; None where it has none.

    Raises:
        OSError: nobody listens; ssl.SSLError: the handshake fails.
    """
    with _connected(host, port, context) as line:
        shown: Any = line.getpeercert() or {}
    alternatives = [value for kind, value in shown.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    subject = [value for part in shown.get("subject", ()) for kind, value in part if kind == "commonName"]
    names: list[str] = alternatives or subject
    return names[0].replace("*", "any") if names else None


def fault(host: str, port: int, context: ssl.SSLContext | None) -> str | None:
    """Why a server that listens can't be talked to; None when nobody listens. `context` None: without TLS."""
    try:
        if context is None:
            socket.create_connection((host, port), _TIMEOUT).close()
            return "it listens, but speaks no gRPC without TLS. For TLS name its authority with --ca FILE"
        with _connected(host, port, context) as line:
            # That it misses a certificate of ours, a server tells after the handshake; gRPC just leaves.
            if line.selected_alpn_protocol() == "h2" and not line.recv(1):
                return _ASKS
    except ssl.SSLError as error:
        return why(error)
    except OSError:
        return None
    return "it listens, but speaks no gRPC"


def why(error: ssl.SSLError, *, own: bool = False) -> str:
    """What a failed handshake means. `own`: it was one with the settings' own address."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _OTHER_NAME:
            hint = "Ask for it by a name that is in its certificate"
        else:
            hint = "Trusted is POMELO_TLS_CERT alone" if own else "Name its authority with --ca FILE"
        return f"its certificate is not trusted: {error.verify_message.rstrip('.')}. {hint}"
    if error.reason and "CERTIFICATE" in error.reason:
        return _ASKS
    return "it listens, but speaks no TLS, or none that is taken here"


def _connected(host: str, port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection((host, port), _TIMEOUT)
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise
