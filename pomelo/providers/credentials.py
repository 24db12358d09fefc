"""What the operator sets for a provider."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to call a vendor: its API key, or None, and the base URL of its API, empty for the vendor's own.
    `settings` are its further settings, an instance of the class that the provider declares, or None."""

    api_key: str | None = field(repr=False)
    base_url: str = ""
    settings: Any = field(default=None, repr=False)
