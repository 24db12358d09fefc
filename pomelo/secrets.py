"""One root secret, a separate key for each purpose."""

from __future__ import annotations

import hashlib
import hmac


def derive_key(root: bytes, purpose: str) -> bytes:
    """The 32-byte key for `purpose`: one step of HKDF-Expand with SHA-256 (RFC 5869).

    Knowing one purpose's key tells nothing of the root or of another's.
    """
    return hmac.digest(root, purpose.encode() + b"\x01", hashlib.sha256)
