"""TLS: the default context, and the certificate of the servers, which can be replaced while they run."""

from __future__ import annotations

import logging
import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

EXPIRY_NOTICE = timedelta(days=14)
"""The time before a certificate ends in which the operator is warned."""

_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"

_VERSION, _UTC_TIME = 0xA0, 0x17
"""Tags of DER."""

log = logging.getLogger("pomelo.tls")


@dataclass(frozen=True)
class Certificate:
    """A certificate with its chain and key, the authority of callers' certificates, and the context of
    connections with it. Two are equal if their files are."""

    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
    context: ssl.SSLContext = field(compare=False)

    @cached_property
    def ends(self) -> float | None:
        """When the certificate itself ends, as Unix time; None if it can't be read."""
        return certificate_end(self.chain)


def default_context(
    purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH, authority: Path | None = None
) -> ssl.SSLContext:
    """Returns Python's default context. It trusts the certificates of a PEM file (None: the well-known ones).

    On every Python it accepts an authority without the extension for its key usage, as gRPC does.

    Raises:
        ssl.SSLError: the file holds no certificate; OSError: it can't be read.
    """
    context = ssl.create_default_context(purpose, cafile=authority)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the default since Python 3.13
    return context


def load_certificate(context: ssl.SSLContext, cert: Path | str, key: Path | str | None) -> None:
    """Adds a certificate and its key to a context. Without `key`, both are in the file `cert`.

    Raises:
        ssl.SSLError: the files are no certificate and key in PEM, or the key has a password; OSError: a file
            can't be read.
    """
    context.load_cert_chain(cert, key, password="")  # otherwise OpenSSL asks for it on the terminal


def read_certificate(cert: Path, key: Path, client_ca: Path | None) -> Certificate:
    """Reads a certificate from PEM files.

    Raises:
        ValueError: the files do not go together; OSError: a file can't be read.
    """

    def read() -> list[bytes | None]:
        return [path.read_bytes() if path is not None else None for path in (cert, key, client_ca)]

    chain, private, authority = files = read()
    assert chain is not None
    assert private is not None
    context = default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        load_certificate(context, cert, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"POMELO_TLS_KEY: {key} is not the key of {cert}") from None
        raise ValueError(
            f"POMELO_TLS_CERT: {cert} and {key} are no certificate and key in PEM without a password"
        ) from None
    if authority is not None:
        try:
            default_context(authority=client_ca)
        except ssl.SSLError:
            raise ValueError(f"POMELO_TLS_CLIENT_CA: {client_ca} has no PEM certificate") from None
    if read() != files:  # gRPC gets what was read, the context has read the files itself
        raise ValueError("POMELO_TLS_CERT: the files change while they are read. Try again")
    return Certificate(chain, private, authority, context)


class ReplaceableContext:
    """A context of a server whose certificate can be replaced: new connections get the new one. One that has
    ended is logged."""

    certificate: Certificate
    """The one that new connections get."""

    def __init__(self, certificate: Certificate) -> None:
        self.context = certificate.context
        self.context.sni_callback = self._choose
        self.replace(certificate)

    def replace(self, certificate: Certificate) -> None:
        self.certificate = certificate
        if certificate.ends is not None and certificate.ends <= time.time():
            end = datetime.fromtimestamp(certificate.ends, UTC)
            log.error("The certificate of POMELO_TLS_CERT ended on %s: replace it, and reload", end.date())

    def _choose(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        # OpenSSL calls this for every handshake, also without a name.
        connection.context = self.certificate.context


def certificate_end(chain: bytes) -> float | None:
    """Returns when the first certificate in PEM ends, as Unix time; None if it can't be read."""
    begin, end = chain.find(_BEGIN), chain.find(_END)
    if not 0 <= begin < end:
        return None
    try:
        return _end_of(ssl.PEM_cert_to_DER_cert(chain[begin : end + len(_END)].decode()))
    except (ValueError, IndexError):
        return None


def _end_of(certificate: bytes) -> float:
    """Returns the end of the validity of a certificate in DER (RFC 5280), which Python reads only in a
    handshake that trusts it.

    Raises:
        ValueError, IndexError: it is not a certificate.
    """
    at = _content(certificate, _content(certificate, 0)[1])[1]  # in the certificate, in what is signed
    if certificate[at] == _VERSION:
        at = _content(certificate, at)[2]
    for _ in ("serial number", "algorithm", "issuer"):
        at = _content(certificate, at)[2]
    begin = _content(certificate, _content(certificate, at)[1])  # in the validity
    tag, start, end = _content(certificate, begin[2])
    form = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(certificate[start:end].decode(), form).replace(tzinfo=UTC).timestamp()


def _content(der: bytes, at: int) -> tuple[int, int, int]:
    """Returns the tag of the element at a position, and where its content begins and ends."""
    size, start = der[at + 1], at + 2
    if size & 0x80:  # the size of the size
        start += size & 0x7F
        size = int.from_bytes(der[at + 2 : start], "big")
    return der[at], start, start + size
