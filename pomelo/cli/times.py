"""Times at the terminal: as they are typed, and as they are shown. UTC where nothing else is said."""

from __future__ import annotations

from typing import Any


def parse_time(text: str) -> float | None:
    """Unix seconds of an ISO date or time, UTC where it names no zone; None: it is neither."""
    from datetime import UTC, datetime

    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def shown(message: Any, field: str) -> str | None:
    """A time of an answer as text; None where it is absent."""
    if not message.HasField(field):
        return None
    at: str = getattr(message, field).ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ")
    return at
