"""The server of a client: its address, TLS, the key, and how calls are made and repeated."""

from __future__ import annotations

import ipaddress
import math
import os
import random
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

from pomelo import __version__
from pomelo.client.errors import ApiError, DeadlineExceeded, text_metadata, to_error
from pomelo.client.tasks import Settings
from pomelo.status import from_rpc_error

DEFAULT_TARGET = "127.0.0.1:50051"
"""Where a server listens if its settings say nothing else."""

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""The maximum size of a response: an image or audio of 16 MiB, and more."""

_MAX_TIMEOUT = 10.0**6
"""Seconds of a longer timeout: grpc takes one of centuries for a time in the past."""

_FIRST_BACKOFF = 0.5
_MAX_BACKOFF = 8.0
"""Seconds before a retry, at random between a half and the whole; the first is doubled for each further
one."""

_INTERRUPTED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""The status of a call that did not reach the server, or that broke; CANCELLED, if the server was stopped."""

_UNENDED = ("server_unavailable", "shutting_down", "store_unavailable")
"""The codes of errors after which the server may still run the task, or try to store its answer."""

_OPTIONS: dict[str, Any] = {
    "grpc.primary_user_agent": f"pomelo-client/{__version__}",
    "grpc.max_receive_message_length": _MAX_MESSAGE_BYTES,
    "grpc.service_config_disable_resolution": 1,
    # Times are in milliseconds.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2_000,
}


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a server, and the defaults of calls. `credentials` are grpc's, None without TLS."""

    target: str
    key: str = field(repr=False)
    credentials: Any = field(repr=False)
    timeout: float
    retries: int
    strict: bool

    def channel(self, api: Any) -> Any:
        """Returns a new channel; `api` is grpc or grpc.aio."""
        options = [*_OPTIONS.items(), ("grpc.enable_http_proxy", int(not _is_local(self.target)))]
        if self.credentials is None:
            return api.insecure_channel(self.target, options=options)
        return api.secure_channel(self.target, self.credentials, options=options)


class ClientBase:
    """The arguments of both clients. POMELO_TARGET and POMELO_KEY stand in for absent ones.

    Raises:
        ValueError, TypeError: one of them is missing or wrong.
        OSError: a file can't be read.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        key: str | None = None,
        ca: str | os.PathLike[str] | bytes | None = None,
        certificate: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        timeout: float = 600.0,
        retries: int = 2,
        strict: bool = False,
    ) -> None:
        if target is None:
            target = os.environ.get("POMELO_TARGET") or DEFAULT_TARGET
        address, secure = _parse_target(target)
        secure = secure or ca is not None or certificate is not None
        if key is None:  # not if it is empty: the call would be charged to another account
            key = os.environ.get("POMELO_KEY", "")
        if not isinstance(key, str):
            raise TypeError(f"key must be text, not {type(key).__name__}")
        key = key.strip()  # a key that was read from a file ends with a line break
        if not key:
            raise ValueError("There is no key: give the argument key, or set POMELO_KEY")
        if not _is_printable(key) or " " in key:
            raise ValueError("The key has characters that no key has")
        credentials = None
        if secure:
            if certificate is not None and (isinstance(certificate, str) or len(certificate) != 2):
                raise ValueError("certificate must be a pair of files: the certificate and its key")
            chain, private = certificate or (None, None)
            roots = ca if isinstance(ca, bytes) else _read(ca)
            credentials = grpc.ssl_channel_credentials(roots, _read(private), _read(chain))
        timeout, retries = _checked_timeout(timeout), _checked_retries(retries)
        self._connection = Connection(address, key, credentials, timeout, retries, strict)
        self._open_client()

    def _open_client(self) -> None:
        """Sets the state of the client."""


class Attempts:
    """The attempts of one call, which share its deadline and its idempotency key.

    A `task` gets the caller's idempotency key, or a new one if it may be repeated. Without a key it is
    repeated only if the server says so: it might run twice. If an attempt broke, and the server has not ended
    its task yet, the next ones wait for its answer, which counts as no retry.

    Raises:
        ValueError, TypeError: one of the `settings` is wrong.
    """

    def __init__(
        self, connection: Connection, settings: Settings | None = None, *, task: bool = False
    ) -> None:
        self._target = connection.target
        settings = settings or {}
        timeout, retries, strict = settings.get("timeout"), settings.get("retries"), settings.get("strict")
        self._deadline = time.monotonic() + (
            connection.timeout if timeout is None else _checked_timeout(timeout)
        )
        self._left = connection.retries if retries is None else _checked_retries(retries)
        self._backoff = _FIRST_BACKOFF
        self._broke = False
        """Whether an attempt ended with an error of `_UNENDED`."""
        self.metadata = [("authorization", f"Bearer {connection.key}")]
        if request_id := settings.get("request_id"):
            self.metadata.append(("x-request-id", _checked_text("request_id", request_id)))
        if connection.strict if strict is None else strict:
            self.metadata.append(("prefer", "handling=strict"))
        key = settings.get("idempotency_key")
        if task and key is None and self._left > 0:
            key = str(uuid.uuid4())
        if key is not None and _checked_text("idempotency_key", key):
            self.metadata.append(("idempotency-key", key))
        self._repeatable = bool(key) or not task

    def arguments(self) -> dict[str, Any]:
        """Returns the metadata and the timeout of the next attempt.

        Raises:
            DeadlineExceeded: no time is left.
        """
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("The timeout passed before the call was done")
        return {"metadata": self.metadata, "timeout": remaining}

    def wait(self, error: Any) -> float:
        """Returns the seconds to wait before the next attempt, after an error (a grpc.RpcError).

        Raises:
            ApiError: the error, if the call must not or can't be repeated in time.
        """
        seconds = self._wait_before_retry(error)
        # ABORTED: the server has not ended a call with the idempotency key, whose answer may be charged.
        unended = self._broke and error.code() is grpc.StatusCode.ABORTED
        self._broke |= from_rpc_error(error).code in _UNENDED
        allowed = self._left > 0 or unended
        if seconds is None or not allowed or time.monotonic() + seconds >= self._deadline:
            raise self.failure(error) from None
        if not unended:
            self._left -= 1
        return seconds

    def failure(self, error: Any) -> ApiError:
        return to_error(error, self._target)

    def _wait_before_retry(self, error: Any) -> float | None:
        """Returns the seconds that the server asks for, or our own backoff, both with jitter; None: no
        retry."""
        backoff, self._backoff = self._backoff, min(2 * self._backoff, _MAX_BACKOFF)
        jitter = random.uniform(0, backoff / 2)  # noqa: S311 - not a secret
        pushback = text_metadata(error.trailing_metadata()).get("grpc-retry-pushback-ms")
        if pushback is not None:
            return int(pushback) / 1000 + jitter if pushback.isdigit() else None
        if error.code() in _INTERRUPTED and self._repeatable:
            return backoff / 2 + jitter
        return None


def _is_printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _checked_text(name: str, value: str) -> str:
    """Returns the value of an argument that is sent as metadata.

    Raises:
        ValueError, TypeError: metadata can't carry it. grpc's own error would blame the server.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, not {type(value).__name__}")
    if not _is_printable(value):
        raise ValueError(f"{name} must be printable ASCII characters, not {value!r}")
    return value


def _checked_timeout(seconds: float) -> float:
    """Returns a timeout that grpc takes as it is meant. One of 0 or less has passed.

    Raises:
        ValueError, TypeError: it is not a number.
    """
    if not isinstance(seconds, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {seconds!r}")
    if math.isnan(seconds):
        raise ValueError("timeout must be a number of seconds, not nan")
    return min(seconds, _MAX_TIMEOUT)


def _checked_retries(retries: int) -> int:
    """Returns a number of retries.

    Raises:
        ValueError, TypeError: it is not one.
    """
    if not isinstance(retries, int):
        raise TypeError(f"retries must be a whole number, not {retries!r}")
    if retries < 0:
        raise ValueError(f"retries must be 0 or more, not {retries}")
    return retries


def _parse_target(text: str) -> tuple[str, bool]:
    """Returns the address for grpc, and whether to use TLS.

    Raises:
        ValueError, TypeError: it is not a valid target.
    """
    if not isinstance(text, str):
        raise TypeError(f"target must be text, not {type(text).__name__}")
    if text.startswith("unix:"):
        return text, False
    scheme, separator, rest = text.rpartition("://")
    if "@" in rest:
        raise ValueError("A target has no user and no password: give the argument key")
    try:
        url = urlsplit(f"//{rest}")
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if (
        scheme not in ("", "http", "https")
        or not host
        or url.path not in ("", "/")
        or url.query
        or url.fragment
    ):
        raise ValueError(f"{text!r} is no target, such as 127.0.0.1:50051 or https://pomelo.example")
    if port is None:
        if not separator:
            raise ValueError(f"{text!r} has no port, such as {text}:50051")
        port = 443 if scheme == "https" else 80
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return address, scheme == "https" or (not scheme and not _is_local(address))


def _is_local(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
