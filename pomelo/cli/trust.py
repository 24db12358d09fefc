"""TLS of the command line: trusted certificates, and the reason why a TLS connection fails."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

from pomelo.cli.terminal import FailureError
from pomelo.network.tls import default_context

_TIMEOUT = 5.0
"""Seconds that a handshake may take."""

_NAME_MISMATCH = (62, 64)
"""OpenSSL's codes for a valid certificate of another host name or IP address."""

_NOT_VALID_NOW = (9, 10)
"""OpenSSL's codes for a certificate that is not valid yet, or no longer."""

_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of HTTP/2 sends first: a server answers it, whatever it speaks."""

_SILENT = "it listens, but does not answer: it hangs, or is overloaded"
_NO_TLS = "it listens, but speaks no gRPC without TLS. For TLS, name its authority with --ca FILE"
NO_CLIENT = "it asks for a client certificate of its authority: set POMELO_TLS_CERT and POMELO_TLS_KEY"
NO_OWN_CLIENT = (
    "it asks for a client certificate of POMELO_TLS_CLIENT_CA, and the server's own is not one. Set "
    "POMELO_TLS_CERT and POMELO_TLS_KEY to a caller's, and name the server's authority with --ca FILE"
)
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def trust_authority(path: Path | None) -> ssl.SSLContext:
    """Returns a context that trusts the authority of a PEM file (None: the well-known ones) and checks names.

    Raises:
        FailureError: the file holds no certificate.
    """
    try:
        return default_context(authority=path)
    except ssl.SSLError:
        raise FailureError(f"--ca {path} holds no PEM certificate") from None


def read_own_certificate(path: Path) -> str:
    """Returns the first certificate of POMELO_TLS_CERT, the server's own, without those of its issuers.

    Raises:
        FailureError: the file holds no certificate; OSError: it can't be read.
    """
    text = path.read_text(errors="replace")
    begin, end = text.find(_BEGIN), text.find(_END)
    if not 0 <= begin < end:
        raise FailureError(f"POMELO_TLS_CERT: {path} holds no PEM certificate")
    return text[begin : end + len(_END)] + "\n"


def trust_own_certificate(path: Path) -> ssl.SSLContext:
    """Returns a context that trusts the certificate of POMELO_TLS_CERT and no other, under any name.

    Raises:
        FailureError: the file holds no certificate; OSError: it can't be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # One certificate is trusted, so checking its name adds nothing; the address may well be 127.0.0.1.
    context.check_hostname = False
    # The certificate's issuer is unknown here, and it need not be self-signed.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=read_own_certificate(path))
    except ssl.SSLError:
        raise FailureError(f"POMELO_TLS_CERT: {path} holds no PEM certificate") from None
    return context


def certificate_name(host: str, port: int, context: ssl.SSLContext) -> str | None:
    """Returns the name in the server's certificate, None if it has none.

    Raises:
        OSError: no server listens; ssl.SSLError: the handshake fails.
    """
    with _connect(host, port, context) as connection:
        peer: Any = connection.getpeercert() or {}
    alternatives = [value for name, value in peer.get("subjectAltName", ()) if name in ("DNS", "IP Address")]
    subject = [value for part in peer.get("subject", ()) for name, value in part if name == "commonName"]
    names: list[str] = alternatives or subject
    return names[0].replace("*", "any") if names else None


def diagnose(host: str, port: int, context: ssl.SSLContext | None) -> str | None:
    """Returns why a server does not answer calls, None if none listens. `context` None: without TLS."""
    try:
        plain = socket.create_connection((host, port), _TIMEOUT)
    except OSError:
        return None
    with plain:
        try:
            if context is None:
                plain.sendall(_GREETING)
                return _SILENT if _is_settings(plain.recv(9)) else _NO_TLS
            with _handshake(plain, host, context) as connection:
                # A server reports a missing client certificate after the handshake; gRPC just disconnects.
                if connection.selected_alpn_protocol() == "h2":
                    answer = connection.recv(9)
                    if not answer:
                        return NO_CLIENT
                    if _is_settings(answer):
                        return _SILENT
        except TimeoutError:
            return _SILENT
        except ssl.SSLError as error:
            return explain_handshake(error)
        except OSError:
            return _NO_TLS if context is None else None
    return "it listens, but speaks no gRPC"


def _is_settings(answer: bytes) -> bool:
    """Whether an answer is that of HTTP/2: then a call that failed met a process that hangs, such as one of
    several workers, or that has ended since."""
    return answer[3:4] == b"\x04"


def explain_handshake(error: ssl.SSLError, *, own: bool = False) -> str:
    """Returns why a handshake failed. `own`: the address is that of the settings."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _NAME_MISMATCH:
            hint = "Call it by a name that is in its certificate"
        elif error.verify_code in _NOT_VALID_NOW:
            hint = "Replace it on the server, and reload; or correct the clock of this machine"
        elif own:
            hint = "It is not that of POMELO_TLS_CERT. If you have replaced the file, reload the server"
        else:
            hint = "Name its authority with --ca FILE"
        return f"its certificate is not trusted: {error.verify_message.rstrip('.')}. {hint}"
    if error.reason and "CERTIFICATE" in error.reason:
        return NO_CLIENT
    return "it listens, but speaks no TLS, or no version that is accepted here"


def _connect(host: str, port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((host, port), _TIMEOUT)
    try:
        return _handshake(plain, host, context)
    except BaseException:
        plain.close()
        raise


def _handshake(plain: socket.socket, host: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(plain, server_hostname=host)
