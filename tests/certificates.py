"""TLS certificates for the servers and clients of tests, created by openssl, and a context that accepts any."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


def make_certificate(folder: Path, name: str, subject: str, *options: str) -> None:
    """Writes `name`.pem and its private key `name`.key. The certificate is valid for two days, and self-signed
    unless `options` of `openssl req` name an authority."""
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
    command += (*files, "-subj", f"/CN={subject}", *options)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def make_expired(folder: Path, name: str) -> None:
    """Writes expired.pem, a certificate with the same key that has ended."""
    files = ("-in", f"{name}.pem", "-signkey", f"{name}.key", "-out", "expired.pem")
    known = subprocess.run(["openssl", "x509", "-help"], check=True, capture_output=True).stderr
    # OpenSSL 3.4 and later have the former, and no longer take the latter.
    dates = ("-not_before", "20200101000000Z", "-not_after", "20200102000000Z")
    command = ["openssl", "x509", *files, *(dates if b"-not_after" in known else ("-days", "-1"))]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def trusting() -> ssl.SSLContext:
    """Returns a client's context that accepts every certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
