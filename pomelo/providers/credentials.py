"""The credentials of a provider."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to call a vendor: its API key, or None, and the base URL of its API, empty for the vendor's own."""

    api_key: str | None = field(repr=False)
    base_url: str = ""
