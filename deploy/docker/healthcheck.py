"""The images' health check: exits with 0 if the REST server of this container accepts requests, else with 1."""

from __future__ import annotations

import http.client
import os
import ssl
import sys

TIMEOUT = 4


def accepts_requests(host: str, port: int) -> bool:
    """Asks `/healthz`, without TLS and then with it: the certificate is of the callers' name, not of this address."""
    plain = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    encrypted = http.client.HTTPSConnection(
        host,
        port,
        timeout=TIMEOUT,
        context=ssl._create_unverified_context(),  # noqa: S323
    )
    for connection in (plain, encrypted):
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return False


if __name__ == "__main__":
    _, _, _port = os.environ["POMELO_REST"].rpartition(":")
    sys.exit(not accepts_requests("127.0.0.1", int(_port)))
