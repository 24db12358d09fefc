"""Detects from the outcome of calls whether the server is available, and logs when that changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from pomelo.errors import PomeloError

log = logging.getLogger("pomelo.gateway")

RECOVERY_TIME = 1.0
"""Seconds without a failure after which a successful call means that the server is back."""

_LOCAL_ERRORS = frozenset({"deadline_exceeded", "shutting_down"})
"""Errors that this process may raise itself, so they do not show whether the server is available."""

_REASONS = (
    (("refused",), "it refuses connections"),
    (("resolution", "resolv", "dns"), "its name can't be resolved"),
    (("handshake", "ssl", "tls", "certificate"), "the TLS handshake fails"),
    (("timed out", "timeout", "keepalive", "ping"), "it does not answer"),
    (("reset", "closed", "goaway", "eof", "broken pipe"), "it closed the connection"),
    (("unreachable", "no route"), "the network has no route to it"),
)
"""Words in gRPC's error details, and the reason to log for them. The details themselves are not logged,
because they may contain addresses and more."""


class ServerWatch:
    """Tracks from the outcome of calls whether the server at `target` is available."""

    def __init__(self, target: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._target = target
        self._monotonic = monotonic
        self._lost_at: float | None = None
        self._failed_at = 0.0

    def call_ended(self, error: BaseException | None) -> None:
        """Records the outcome of a call: its error, or None if it succeeded."""
        if isinstance(error, PomeloError) and error.code == "server_unavailable":
            self._failed(error)
        elif error is None or (isinstance(error, PomeloError) and error.code not in _LOCAL_ERRORS):
            self._answered()

    def _failed(self, error: PomeloError) -> None:
        now = self._failed_at = self._monotonic()
        if self._lost_at is None:
            self._lost_at = now
            log.warning(
                "The server at %s is lost: %s. Until it is back, calls get server_unavailable",
                self._target,
                _reason(error.__context__),
            )

    def _answered(self) -> None:
        if self._lost_at is None:
            return
        now = self._monotonic()
        if now - self._failed_at >= RECOVERY_TIME:
            log.info("The server at %s is back after %.0f s", self._target, now - self._lost_at)
            self._lost_at = None


def _reason(cause: Any) -> str:
    """Returns why the server is lost, without gRPC's own text; `cause` is gRPC's error."""
    details = ((cause.details() if hasattr(cause, "details") else None) or "").lower()
    return next(
        (reason for words, reason in _REASONS if any(word in details for word in words)), "unavailable"
    )
