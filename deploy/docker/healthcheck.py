"""The images' health check: exits with 0 if the server in this container accepts requests, else with 1."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import sys

TIMEOUT = 4


def rest_accepts_requests(host: str, port: int) -> bool:
    """Asks `/healthz` without TLS, then with it. The certificate is for another name than this address."""
    unverified = ssl._create_unverified_context()  # noqa: S323
    for connection in (
        http.client.HTTPConnection(host, port, timeout=TIMEOUT),
        http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=unverified),
    ):
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return False


def grpc_accepts_connections(host: str, port: int) -> bool:
    """Connects to the port; for servers without REST."""
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except OSError:
        return False
    return True


def main() -> bool:
    for variable, check in (
        ("POMELO_REST", rest_accepts_requests),
        ("POMELO_GRPC", grpc_accepts_connections),
    ):
        if address := os.environ.get(variable):
            host, _, port = address.rpartition(":")
            return check(host.strip("[]"), int(port))  # on Linux, 0.0.0.0 and :: are this machine
    return False


if __name__ == "__main__":
    sys.exit(not main())
