"""The retirement of models and routes: headers for callers and notices for the operator.

Vendors announce the day of a retirement, but not the hour or the time zone. Callers get the start of the day
in UTC, and a route is used until the end of the day.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from email.utils import format_datetime
from functools import lru_cache

from pomelo.catalog.catalog import RETIREMENT_NOTICE, Catalog, Model

_INTERVAL = 3600.0
"""Seconds between two searches for what has ended."""

log = logging.getLogger("pomelo.catalog")


@dataclass(frozen=True, slots=True)
class Notice:
    """A model or a route that ends soon or has ended. `subject` names it, such as "model gpt-4"."""

    subject: str
    retires: date
    is_past: bool

    def __str__(self) -> str:
        verb = "ended" if self.is_past else "ends"
        return f"{self.subject} {verb} on {self.retires}. Replace it in the catalogue of POMELO_CATALOG"


def start_of(day: date) -> datetime:
    """The start of a day in UTC."""
    return datetime.combine(day, time.min, UTC)


def headers(model: Model) -> Mapping[str, str]:
    """The headers `Deprecation` (RFC 9745) and `Sunset` (RFC 8594) of a model that ends; else none."""
    if model.deprecated is None and model.retires is None:
        return {}
    return _headers(model.deprecated, model.retires)


@lru_cache(maxsize=1024)
def _headers(deprecated: date | None, retires: date | None) -> Mapping[str, str]:
    headers = {}
    if deprecated is not None:
        headers["Deprecation"] = f"@{int(start_of(deprecated).timestamp())}"
    if retires is not None:
        headers["Sunset"] = format_datetime(start_of(retires), usegmt=True)
    return headers


def is_past(day: date | None, today: date) -> bool:
    return day is not None and day < today


def notices(catalog: Catalog, today: date) -> Iterator[Notice]:
    """The models and routes that have ended or end within RETIREMENT_NOTICE; each model once."""
    for model in catalog.models.values():
        if model.retires is not None and model.retires <= today + RETIREMENT_NOTICE:
            yield Notice(f"model {model.name}", model.retires, is_past(model.retires, today))
            continue
        for route in model.routes:
            if route.retires is not None and route.retires <= today + RETIREMENT_NOTICE:
                subject = f"the route of {model.name} to {route.model} at {route.provider}"
                yield Notice(subject, route.retires, is_past(route.retires, today))


async def log_ended(catalog: Callable[[], Catalog], now: Callable[[], float]) -> None:
    """Logs each model and route that has ended, once, until it is cancelled. `now` returns Unix time."""
    logged = set()
    while True:
        for notice in notices(catalog(), datetime.fromtimestamp(now(), UTC).date()):
            if notice.is_past and str(notice) not in logged:
                logged.add(str(notice))
                log.warning("%s. It is still called if no other route is left", notice)
        await asyncio.sleep(_INTERVAL)
