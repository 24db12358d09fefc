"""Whether a server answers at the addresses of the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pomelo.cli.findings import Finding
from pomelo.cli.terminal import FailureError, explain

if TYPE_CHECKING:
    from ssl import SSLContext

    from pomelo.settings import Settings

TIMEOUT = 5.0
"""Seconds that one check may take."""

_MAX_BODY = 1_000
"""Bytes of an answer that are read: an error of a health check has fewer."""


def check_grpc(settings: Settings, served: bool) -> Finding:
    """Asks the gRPC server for its health. `served`: the operator's socket says that a server runs."""
    if (reason := _no_address("POMELO_GRPC", settings.grpc)) is not None:
        return Finding("gRPC", "off", reason)
    import asyncio

    from pomelo.cli.client import NobodyError, NoCallerError, open_client
    from pomelo.server.remote.health import open_health

    async def is_serving() -> bool:
        async with open_client(open_health, settings, None) as check:
            return await check(TIMEOUT)

    try:
        serving = asyncio.run(is_serving())
    except NobodyError:
        return _unreachable("gRPC", settings.grpc, served)
    except NoCallerError:
        detail = f"{settings.grpc} wants a certificate of POMELO_TLS_CLIENT_CA, so its health was not asked"
        return Finding("gRPC", "ok", detail)
    except Exception as error:
        return Finding("gRPC", "broken", explain(error))
    if not serving:
        return Finding("gRPC", "broken", f"{settings.grpc} takes no calls: it is not ready, or shutting down")
    return Finding("gRPC", "ok", f"{settings.grpc} serves")


def check_rest(settings: Settings, served: bool) -> Finding:
    """Asks the REST gateway for its health. `served` as in `check_grpc`."""
    if (reason := _no_address("POMELO_REST", settings.rest)) is not None:
        return Finding("REST", "off", reason)
    import ssl

    from pomelo.cli.trust import explain_handshake, trust_own_certificate

    scheme = "https" if settings.tls_cert else "http"
    try:
        context = trust_own_certificate(settings.tls_cert) if settings.tls_cert else None
        status, body = _get(f"{scheme}://{settings.rest}/healthz", {}, context)
    except FailureError as error:
        return Finding("REST", "broken", str(error))
    except ssl.SSLError as error:
        return Finding("REST", "broken", f"{settings.rest}: {explain_handshake(error, own=True)}")
    except OSError:
        return _unreachable("REST", settings.rest, served)
    if status == 503:
        return Finding("REST", "broken", f"{settings.rest} takes no requests: {_reason(body)}")
    if status != 200:
        return Finding("REST", "broken", f"another program answers at {settings.rest}. Set POMELO_REST")
    return Finding("REST", "ok", f"{settings.rest} serves")


def _reason(body: bytes) -> str:
    """Says why a server is not ready, by the error that its health check returns."""
    import json

    from pomelo.telemetry.readiness import REASONS

    try:
        return REASONS[json.loads(body)["error"]["code"]]
    except (ValueError, KeyError, TypeError):  # of an earlier version, or of a proxy
        return "it is not ready, or shutting down"


def _no_address(variable: str, address: str) -> str | None:
    """Says why a server can't be asked at the address of its settings; None if it can be."""
    from pomelo.network.addresses import split_address

    if not address:
        return f"{variable} is empty"
    if split_address(address)[1] == 0:
        return f"{variable} has port 0, so the server's own port is not known here"
    return None


def _unreachable(name: str, address: str, served: bool) -> Finding:
    if served:
        return Finding(name, "broken", f"the server runs, but {address} does not answer")
    return Finding(name, "off", f"no server at {address}. Start one with: pomelo serve")


def get_status(url: str, headers: dict[str, str], context: SSLContext | None = None) -> int:
    """Returns the status of a response. Follows no redirect and uses no proxy, like the server.

    `context` has the trusted certificates for https; None: the well-known authorities.

    Raises:
        OSError: there is no response.
    """
    return _get(url, headers, context)[0]


def _get(url: str, headers: dict[str, str], context: SSLContext | None) -> tuple[int, bytes]:
    """As `get_status`, with the beginning of the body."""
    from http.client import HTTPConnection, HTTPException, HTTPSConnection

    from yarl import URL

    parts = URL(url)  # it encodes other characters than those of ASCII, as the server does
    host = parts.raw_host or ""
    if parts.scheme == "https":
        connection: HTTPConnection = HTTPSConnection(host, parts.port, timeout=TIMEOUT, context=context)
    else:
        connection = HTTPConnection(host, parts.port, timeout=TIMEOUT)
    try:
        connection.request("GET", parts.raw_path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(_MAX_BODY)
    except (HTTPException, UnicodeError) as error:  # UnicodeError: of a host that can't be looked up
        raise OSError(str(error)) from error
    finally:
        connection.close()
