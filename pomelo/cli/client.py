"""The command line as a client: the services of a running server, and why it can't be reached.

The client is imported when a server is opened.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pomelo.cli.terminal import FailureError

if TYPE_CHECKING:
    from pomelo.call import Call
    from pomelo.server.remote import Tls
    from pomelo.settings import Settings


T = TypeVar("T")


class NobodyError(FailureError):
    """No server listens at the address."""


class NoCallerError(FailureError):
    """The server of the settings asks for a client certificate, and its own is not one."""


@asynccontextmanager
async def open_client(
    opener: Callable[..., AbstractAsyncContextManager[T]],
    settings: Settings,
    target: str | None,
    ca: Path | None = None,
) -> AsyncIterator[T]:
    """Yields what `opener`, such as `open_remote`, opens for the server at `target`, or at the settings' own
    address, whose certificate is trusted.

    `ca` is the authority to trust (None: the well-known ones). A server that asks for a certificate is shown
    the settings' own.

    Raises:
        FailureError: it can't be talked to (NobodyError: nobody listens); PomeloError: what the server
        answered within the block.
    """
    from pomelo.cli import trust
    from pomelo.errors import PomeloError
    from pomelo.network.addresses import is_loopback

    address, host, port = _find_server(settings, target)
    options: dict[str, Any] = {"grpc.enable_http_proxy": int(not is_loopback(host))}
    own = ca is None and target in (None, settings.grpc)
    context, tls = _choose_tls(settings, host, ca, own=own)
    if own and context is not None:
        try:
            name = trust.certificate_name(host, port, context)
        except ssl.SSLError as error:
            raise FailureError(f"{address}: {trust.explain_handshake(error, own=True)}") from None
        except OSError:
            raise _nobody(address) from None
        if name is not None:
            options["grpc.ssl_target_name_override"] = name
    log = logging.getLogger("pomelo.gateway")
    level = log.level
    log.setLevel(logging.ERROR)  # a lost server is reported below
    try:
        async with opener(address, tls=tls, options=options) as client:
            yield client
    except PomeloError as error:
        if error.code == "invalid_api_key":  # often an exported key of another server
            error.add_note(f"The key is that of --key, else of POMELO_KEY, else of {settings.key_file}")
        if error.code != "server_unavailable":
            raise
        reason = trust.diagnose(host, port, context)
        if reason is None:
            raise _nobody(address) from error
        if own and reason == trust.NO_CLIENT:
            raise NoCallerError(f"{address}: {trust.NO_OWN_CLIENT}") from error
        raise FailureError(f"{address}: {reason}") from error
    finally:
        log.setLevel(level)


def _find_server(settings: Settings, target: str | None) -> tuple[str, str, int]:
    """Returns the address of the server at `target`, or of the settings, and its host and port."""
    from pomelo.network.addresses import is_every_address, split_address

    address = target or settings.grpc
    if not address:
        raise FailureError("POMELO_GRPC is empty: gRPC is off. Name a server with --target HOST:PORT")
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise FailureError(f"--target {error}") from None
    if port == 0:
        raise FailureError("POMELO_GRPC has port 0: any free one. Name the server with --target HOST:PORT")
    if is_every_address(host):
        return f"127.0.0.1:{port}", "127.0.0.1", port
    return address, host, port


def _choose_tls(
    settings: Settings, host: str, ca: Path | None, *, own: bool
) -> tuple[ssl.SSLContext | None, Tls | None]:
    """Returns TLS to a server, for Python and for grpc; None without it. `own`: that of the settings, which
    has TLS if they have a certificate."""
    from pomelo.cli import trust
    from pomelo.network.addresses import is_loopback
    from pomelo.network.tls import load_certificate
    from pomelo.server.remote import Tls

    cert = settings.tls_cert
    authority: Path | bytes | None
    if own and cert is not None:
        context, authority = trust.trust_own_certificate(cert), trust.read_own_certificate(cert).encode()
    elif not own and (ca is not None or cert is not None or not is_loopback(host)):
        context, authority = trust.trust_authority(ca), ca
    else:
        return None, None
    if cert is None or (own and settings.tls_client_ca is None):  # the own server asks for one only then
        return context, Tls(authority)
    load_certificate(context, cert, settings.tls_key)
    return context, Tls(authority, cert, settings.tls_key)


def new_call(key: str | None) -> Call:
    """Returns a new call with an API key."""
    from pomelo.call import Call

    call = Call.from_headers(lambda name: None, protocol="grpc")
    call.api_key = key
    return call


def is_served(path: Path) -> bool:
    """Whether a process listens on the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def find_key(settings: Settings, key: str | None) -> str:
    """Returns the API key: `key`, or the development key of the data folder.

    Raises:
        FailureError: there is no key, or it can't be a key.
    """
    if not key:
        try:
            key = settings.key_file.read_text()
        except (OSError, UnicodeDecodeError):
            raise FailureError(
                f"There is no key: set POMELO_KEY or --key ({settings.key_file} can't be read)"
            ) from None
    key = key.strip()
    if not key.isascii() or not key.isprintable():
        raise FailureError("The key has characters that no key has")
    return key


def _nobody(address: str) -> NobodyError:
    return NobodyError(
        f"No server answers at {address}. Start one with: pomelo serve, or name it with --target HOST:PORT"
    )
