"""The command line as a gRPC client: channels to a running server, and its errors.

grpc is imported when a channel is opened.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomelo.cli.terminal import FailureError

if TYPE_CHECKING:
    from pomelo.settings import Settings


class NobodyError(FailureError):
    """No server listens at the address."""


@contextmanager
def server(settings: Settings, target: str | None, ca: Path | None = None) -> Iterator[Any]:
    """A channel to the server at `target`, or at the settings' own address, whose certificate is trusted.

    `ca` is the authority to trust (None: the well-known ones). A server that asks for a certificate is shown
    the settings' own.

    Raises:
        FailureError: it can't be talked to (NobodyError: nobody listens); PomeloError: what the server
        answered within the block.
    """
    import grpc

    from pomelo.addresses import is_loopback, split_address
    from pomelo.cli import trust

    address = target or settings.grpc
    if not address:
        raise FailureError("POMELO_GRPC is empty: gRPC is off. Name a server with --target HOST:PORT")
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise FailureError(f"--target {error}") from None
    if port == 0:
        raise FailureError("POMELO_GRPC has port 0: any free one. Name the server with --target HOST:PORT")
    if host in ("0.0.0.0", "::"):  # noqa: S104 - a server that listens on every address also listens here
        host = "127.0.0.1"
        address = f"{host}:{port}"
    # A response may contain a whole image or audio file; the user chose the server, so its size is not
    # limited.
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", -1)]
    if is_loopback(host):
        options.append(("grpc.enable_http_proxy", 0))
    own = ca is None and target in (None, settings.grpc)
    context: ssl.SSLContext | None = None
    roots: bytes | None = None
    pair: tuple[bytes | None, bytes | None] = (None, None)
    if own and settings.tls_cert is not None:
        context = trust.trust_own_certificate(settings.tls_cert)
        roots = trust.read_own_certificate(settings.tls_cert).encode()
    elif ca is not None or settings.tls_cert is not None or not (is_loopback(host) or settings.insecure):
        context = trust.trust_authority(ca)
        roots = ca.read_bytes() if ca is not None else None
    if (
        context is not None
        and settings.tls_cert is not None
        and settings.tls_key is not None
        and (settings.tls_client_ca is not None or not own)  # the own server asks for one only then
    ):
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
    if own and context is not None:
        try:
            name = trust.certificate_name(host, port, context)
        except ssl.SSLError as error:
            raise FailureError(f"{address}: {trust.explain_handshake(error, own=True)}") from None
        except OSError:
            raise _nobody(address) from None
        if name is not None:
            options.append(("grpc.ssl_target_name_override", name))
    if context is None:
        channel = grpc.insecure_channel(address, options)
    else:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(roots, *pair), options)

    def unreachable() -> FailureError:
        reason = trust.diagnose(host, port, context)
        return _nobody(address) if reason is None else FailureError(f"{address}: {reason}")

    with channel, _errors(unreachable):
        yield channel


def is_served(path: Path) -> bool:
    """Whether a process listens on the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def bearer(settings: Settings, key: str | None) -> list[tuple[str, str]]:
    """The metadata with the API key: `key`, or the development key of the data folder.

    Raises:
        FailureError: there is no key, or it can't be a key.
    """
    if not key:
        try:
            key = settings.key_file.read_text().strip()
        except OSError:
            raise FailureError(
                f"There is no key: set POMELO_KEY or --key ({settings.key_file} can't be read)"
            ) from None
    if not key.isascii() or not key.isprintable():
        raise FailureError("The key has characters that no key has")
    return [("authorization", f"Bearer {key}")]


def _nobody(address: str) -> NobodyError:
    return NobodyError(f"No server answers at {address}. Start one with: pomelo serve")


@contextmanager
def _errors(unreachable: Callable[[], FailureError]) -> Iterator[None]:
    import grpc

    try:
        yield
    except grpc.RpcError as error:
        from pomelo.status import DETAILS_KEY, from_rpc_error

        ours = any(name == DETAILS_KEY for name, _ in error.trailing_metadata() or ())
        if error.code() is grpc.StatusCode.UNAVAILABLE and not ours:
            raise unreachable() from error
        raise from_rpc_error(error) from error
