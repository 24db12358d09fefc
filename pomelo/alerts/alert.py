"""One alert: its id and its body, and the signature of a message by the scheme of Standard Webhooks."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic_core import to_json

from pomelo.secrets import derive_keys

SECRET_PREFIX = "whsec_"  # noqa: S105 (not a secret)


@dataclass(frozen=True, slots=True)
class Alert:
    """What an operator should know. `type` is a word such as balance.low, `at` Unix time; `data` has no
    content, key or secret of anyone."""

    id: str
    type: str
    at: float
    data: Mapping[str, Any]

    def body(self) -> bytes:
        """The alert as JSON."""
        time = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds")
        return to_json({"type": self.type, "timestamp": time.replace("+00:00", "Z"), "data": self.data})


def alert_id(*occasion: object) -> str:
    """The id of the alert of an occasion: the same in all processes, and after a restart."""
    return f"alert_{hashlib.sha256(repr(occasion).encode()).hexdigest()[:32]}"


def signed_headers(alert: Alert, body: bytes, keys: Iterable[bytes], now: int) -> dict[str, str]:
    """The headers of a request with `body` at Unix time `now`, with a signature by each of the keys."""
    signed = f"{alert.id}.{now}.".encode() + body
    digests = [hmac.digest(key, signed, hashlib.sha256) for key in keys]
    return {
        "Content-Type": "application/json",
        "User-Agent": "Pomelo",
        "webhook-id": alert.id,
        "webhook-timestamp": str(now),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }


def signing_keys(secrets: Sequence[str], roots: Iterable[bytes]) -> tuple[bytes, ...]:
    """The keys of `secrets`, such as whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw; without any, keys that are
    derived from root secrets."""
    if not secrets:
        return derive_keys(roots, "alerts")
    return tuple([base64.b64decode(secret.removeprefix(SECRET_PREFIX)) for secret in secrets])


def encode_secret(key: bytes) -> str:
    """The text of a key, as receivers need it."""
    return SECRET_PREFIX + base64.b64encode(key).decode()
