"""Times at the terminal, as input and output. In UTC unless a zone is named."""

from __future__ import annotations

from typing import Any


def parse_time(text: str) -> float | None:
    """Returns Unix seconds of an ISO date or time, in UTC unless it names a zone; None if it is neither."""
    from datetime import UTC, datetime

    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def format_time(message: Any, field: str) -> str | None:
    """Returns a Timestamp field as text, None if it is absent."""
    if not message.HasField(field):
        return None
    text: str = getattr(message, field).ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ")
    return text
