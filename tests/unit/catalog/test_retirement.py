"""Models and routes that end: the headers for callers, and the notices for the operator."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, date, datetime

import pytest

from pomelo.catalog import retirement
from pomelo.catalog.catalog import Catalog, Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.gen.v1.task_pb2 import TaskType
from tests.waiting import cancel, until

TODAY = date(2027, 1, 1)
MODEL = Model("m", TaskType.TASK_TYPE_TEXT, (Route("p", "m-1"),), Limits(), Prices(), "")


def test_a_model_that_ends_has_the_headers_of_its_dates() -> None:
    assert retirement.headers(MODEL) == {}
    assert retirement.headers(replace(MODEL, deprecated=date(1970, 1, 2))) == {"Deprecation": "@86400"}
    ending = replace(MODEL, deprecated=date(1970, 1, 2), retires=date(2027, 1, 1))
    sunset = "Fri, 01 Jan 2027 00:00:00 GMT"
    assert retirement.headers(ending) == {"Deprecation": "@86400", "Sunset": sunset}


@pytest.mark.parametrize(
    ("day", "notice"),
    [
        (None, None),
        (date(2027, 3, 3), None),
        (date(2027, 3, 2), "ends on 2027-03-02"),
        (date(2027, 1, 1), "ends on 2027-01-01"),
        (date(2026, 12, 31), "ended on 2026-12-31"),
    ],
)
def test_the_operator_is_warned_sixty_days_before_a_model_or_a_route_ends(
    day: date | None, notice: str | None
) -> None:
    routes = (Route("p", "m-1", retires=day), Route("q", "m-2"))
    for model, subjects in (
        (replace(MODEL, routes=routes), ["the route of m to m-1 at p"]),
        (replace(MODEL, routes=routes, retires=day), ["model m"]),
    ):
        found = [str(one).partition(". ")[0] for one in retirement.notices(Catalog([model]), TODAY)]
        assert found == ([f"{subject} {notice}" for subject in subjects] if notice else [])


async def test_what_has_ended_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retirement, "_INTERVAL", 0.0)
    looks = 0

    def catalog() -> Catalog:
        nonlocal looks
        looks += 1
        ends = date(2026, 12, 31) if looks > 1 else date(2027, 1, 1)
        return Catalog([replace(MODEL, retires=ends)])

    now = datetime(2027, 1, 1, 12, tzinfo=UTC).timestamp()
    logging = asyncio.create_task(retirement.log_ended(catalog, lambda: now))
    await until(lambda: looks > 4)
    await cancel(logging)
    (line,) = caplog.messages
    assert line.startswith("model m ended on 2026-12-31.")
