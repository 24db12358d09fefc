"""`pomelo prices check`: the catalogue's prices of text beside those of a published price list.

The list is that of the package genai-prices, which collects the vendors' prices by date and is updated more
often than this one. It is no dependency of the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from pomelo.cli.terminal import Config, FailureError, Json, print_json, print_table

if TYPE_CHECKING:
    from pomelo.catalog.catalog import Catalog, Model, Route

_LISTED = {
    "million_input_tokens": "input_mtok",
    "million_cached_input_tokens": "cache_read_mtok",
    "million_cache_write_input_tokens": "cache_write_mtok",
    "million_cache_write_1h_input_tokens": "cache_write_1h_mtok",
    "million_output_tokens": "output_mtok",
}
"""Unit of the catalogue -> the list's name of it."""


class Difference(NamedTuple):
    """A price that is not the list's. `from_input_tokens` is that of the tier, 0 below the first one; prices
    are credits, None where there is none. `note` is the row's `price_note`, which explains it."""

    model: str
    provider: str
    provider_model: str
    from_input_tokens: int
    unit: str
    price: Decimal | None
    listed: Decimal | None
    note: str


def commands() -> typer.Typer:
    """The commands of the noun."""
    app = typer.Typer(help="Compare prices.", no_args_is_help=True, rich_markup_mode=None)
    app.callback()(_noun)
    app.command("check")(check)
    return app


def _noun() -> None:
    """Compare prices."""


def check(
    config: Config = None,
    at: Annotated[str, typer.Option(help="The day of the list, such as 2026-11-26. Default: today.")] = "",
    as_json: Json = False,
) -> None:
    """Compare the catalogue's prices of text with the list of the package genai-prices.

    Status 1 where one differs and its row has no price_note that explains why.
    """
    from pomelo.configuration import find_providers
    from pomelo.settings import load

    try:
        when = datetime.fromisoformat(at).replace(tzinfo=UTC) if at else datetime.now(UTC)
    except ValueError as error:
        raise FailureError("--at must be a day such as 2026-11-26") from error
    catalog = find_providers(load(config)).catalog
    found = list(differences(catalog, when))
    if as_json:
        print_json([_json(one) for one in found])
    elif found:
        print_table(
            ("MODEL", "ROUTE", "PRICE OF", "HERE", "LISTED", "NOTE"),
            [
                (
                    one.model,
                    f"{one.provider} {one.provider_model}",
                    one.unit + (f" from {one.from_input_tokens:,} tokens" if one.from_input_tokens else ""),
                    _shown(one.price),
                    _shown(one.listed),
                    one.note,
                )
                for one in found
            ],
        )
    else:
        count = sum(1 for _ in _compared(catalog, when))
        typer.echo(
            f"The prices of {count} routes of text are those of the list. It does not have the others."
        )
    if not all(one.note for one in found):
        raise typer.Exit(1)


def differences(catalog: Catalog, when: datetime) -> Iterator[Difference]:
    """The prices of the catalogue's routes that are not those of the list on a day. Routes that the list does
    not have are passed over.

    Raises:
        FailureError: the package genai-prices is not installed.
    """
    for model, route, listed in _compared(catalog, when):
        prices, _ = model.priced(route)
        note = route.price_note if route.prices else model.price_note
        for least in sorted({0, *(least for least, _ in prices.tiers), *_tiers(listed)}):
            ours = _credits(prices.at(least))
            theirs = _prices_at(listed, least)
            for unit in _LISTED:
                if ours.get(unit) != theirs.get(unit):
                    yield Difference(
                        model.name,
                        route.provider,
                        route.model,
                        least,
                        unit,
                        ours.get(unit),
                        theirs.get(unit),
                        note,
                    )


def _compared(catalog: Catalog, when: datetime) -> Iterator[tuple[Model, Route, Any]]:
    """The routes of text that the list has, each with its prices there."""
    from pomelo.gen.v1.task_pb2 import TaskType

    for model in catalog.models.values():
        if model.task_type != TaskType.TASK_TYPE_TEXT:
            continue  # the list has no prices of images and audio
        for route in model.routes:
            listed = _listed(route.provider, route.model, when)
            if listed is not None:
                yield model, route, listed


def _listed(provider: str, model: str, when: datetime) -> Any:
    """The list's prices of a provider's model on a day; None where it has none."""
    try:
        from genai_prices.data_snapshot import get_snapshot
    except ModuleNotFoundError as error:
        raise FailureError("The price list is another package: pip install genai-prices") from error
    try:
        _, found = get_snapshot().find_provider_model(model, None, provider, None)
    except LookupError:
        return None
    return found.get_prices(when)


def _tiers(listed: Any) -> Iterator[int]:
    """From how many tokens of input the list's tiers apply: it has the last one of the tier below."""
    for name in _LISTED.values():
        for tier in getattr(getattr(listed, name, None), "tiers", ()):
            yield tier.start + 1


def _prices_at(listed: Any, input_tokens: int) -> dict[str, Decimal]:
    """The list's prices of a task with so many tokens of input, by our names of the units."""
    found = {}
    for unit, name in _LISTED.items():
        price = getattr(listed, name, None)
        for tier in getattr(price, "tiers", ()):
            if input_tokens > tier.start:
                found[unit] = tier.price
        if price is not None and unit not in found:
            found[unit] = getattr(price, "base", price)
    return found


def _credits(units: Any) -> dict[str, Decimal]:
    from pomelo.catalog.pricing import unit_name
    from pomelo.money import MICROS

    return {unit_name(unit): Decimal(micros) / MICROS for unit, micros in units.items()}


def _json(one: Difference) -> dict[str, Any]:
    return one._asdict() | {"price": _text(one.price), "listed": _text(one.listed)}


def _text(price: Decimal | None) -> str | None:
    return None if price is None else f"{price:f}"


def _shown(price: Decimal | None) -> str:
    return "-" if price is None else f"{price.normalize():f}"
