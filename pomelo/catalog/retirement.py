"""Models and routes that end: the headers that tell callers, and the notices for the operator.

A date is a whole day in UTC. Vendors name the day but not the hour or the time zone of an end, so callers are
told its first moment, and a route is used until its last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from email.utils import format_datetime
from functools import lru_cache

from pomelo.catalog.catalog import NOTICE, Catalog, Model


@dataclass(frozen=True, slots=True)
class Notice:
    """A model or a route that ends soon or has ended. `what` names it, such as "model gpt-4"."""

    what: str
    retires: date
    is_past: bool

    def __str__(self) -> str:
        """A sentence for the operator."""
        verb = "ended" if self.is_past else "ends"
        return f"{self.what} {verb} on {self.retires}. Replace it in the catalogue of POMELO_CATALOG"


def start_of(day: date) -> datetime:
    """The first moment of a day in UTC."""
    return datetime.combine(day, time.min, UTC)


def headers(model: Model) -> Mapping[str, str]:
    """The headers of answers about a model: `Deprecation` (RFC 9745) and `Sunset` (RFC 8594), if it ends."""
    if model.deprecated is None and model.retires is None:
        return {}
    return _headers(model.deprecated, model.retires)


@lru_cache(maxsize=1024)
def _headers(deprecated: date | None, retires: date | None) -> Mapping[str, str]:
    made = {}
    if deprecated is not None:
        made["Deprecation"] = f"@{int(start_of(deprecated).timestamp())}"
    if retires is not None:
        made["Sunset"] = format_datetime(start_of(retires), usegmt=True)
    return made


def is_past(day: date | None, today: date) -> bool:
    """Whether that day is over."""
    return day is not None and day < today


def notices(catalog: Catalog, today: date) -> Iterator[Notice]:
    """The models and routes whose end is past or at most NOTICE away; a model is named once, and not for each
    of its routes."""
    for model in catalog.models.values():
        if model.retires is not None and model.retires <= today + NOTICE:
            yield Notice(f"model {model.name}", model.retires, is_past(model.retires, today))
            continue
        for route in model.routes:
            if route.retires is not None and route.retires <= today + NOTICE:
                what = f"the route of {model.name} to {route.model} at {route.provider}"
                yield Notice(what, route.retires, is_past(route.retires, today))
