"""`pomelo prices check`: compares the catalogue's prices of text models with a published price list.

The list is the package genai-prices, which has the vendors' prices by date. The server does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from pomelo.cli.terminal import Commands, Config, FailureError, Json, print_json, print_pages

if TYPE_CHECKING:
    from pomelo.catalog.catalog import Catalog, Model, Route

_LIST_FIELDS = {
    "million_input_tokens": "input_mtok",
    "million_cached_input_tokens": "cache_read_mtok",
    "million_cache_write_input_tokens": "cache_write_mtok",
    "million_cache_write_1h_input_tokens": "cache_write_1h_mtok",
    "million_output_tokens": "output_mtok",
}
"""Unit of the catalogue -> field of the list."""


class Difference(NamedTuple):
    """A price that differs from the list's. `from_input_tokens` is that of the tier, 0 below the first one.
    Prices are in credits, None if missing. `note` is the row's `price_note`, which explains the
    difference."""

    model: str
    provider: str
    provider_model: str
    from_input_tokens: int
    unit: str
    price: Decimal | None
    listed: Decimal | None
    note: str


def commands() -> Commands:
    app = Commands("Compare prices.")
    app.callback()(_noun)
    app.add("check", check)
    return app


def _noun() -> None:
    """Compare prices."""


def check(
    config: Config = None,
    at: Annotated[
        str, typer.Option(metavar="DAY", help="The day of the list, such as 2026-11-26. Default: today.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Compare the prices of text models with a published list.

    The list is that of the package genai-prices. Status 1 if a price differs and its row has no price_note.
    """
    from pomelo.configuration import find_providers
    from pomelo.settings import load

    try:
        when = datetime.fromisoformat(at).replace(tzinfo=UTC) if at else datetime.now(UTC)
    except ValueError as error:
        raise typer.BadParameter("must be a day such as 2026-11-26", param_hint="--at") from error
    catalog = find_providers(load(config)).catalog
    different = list(differences(catalog, when))
    if as_json:
        print_json([_json(one) for one in different])
    elif different:
        rows = [
            (
                one.model,
                f"{one.provider} {one.provider_model}",
                one.unit + (f" from {one.from_input_tokens:,} tokens" if one.from_input_tokens else ""),
                _shown(one.price),
                _shown(one.listed),
                one.note,
            )
            for one in different
        ]
        print_pages(("MODEL", "ROUTE", "PRICE OF", "HERE", "LISTED", "NOTE"), [rows])
    else:
        count = sum(1 for _ in _listed_routes(catalog, when))
        typer.echo(
            f"The prices of {count} routes of text are those of the list. It does not have the others."
        )
    if not all(one.note for one in different):
        raise typer.Exit(1)


def differences(catalog: Catalog, when: datetime) -> Iterator[Difference]:
    """The prices of the catalogue's routes that differ from the list's on a day. Routes that are not in the
    list are skipped.

    Raises:
        FailureError: the package genai-prices is not installed.
    """
    for model, route, listed in _listed_routes(catalog, when):
        prices, _ = model.prices_for(route)
        note = route.price_note if route.prices else model.price_note
        for from_tokens in sorted({0, *(from_tokens for from_tokens, _ in prices.tiers), *_tiers(listed)}):
            ours = _credits(prices.at(from_tokens))
            theirs = _list_prices_at(listed, from_tokens)
            for unit in _LIST_FIELDS:
                if (price := ours.get(unit)) != (other := theirs.get(unit)):
                    names = model.name, route.provider, route.model
                    yield Difference(*names, from_tokens, unit, price, other, note)


def _listed_routes(catalog: Catalog, when: datetime) -> Iterator[tuple[Model, Route, Any]]:
    """The routes of text models that are in the list, each with the list's prices."""
    from pomelo.gen.v1.task_pb2 import TaskType

    for model in catalog.models.values():
        if model.task_type != TaskType.TASK_TYPE_TEXT:
            continue  # the list has no prices of images and audio
        for route in model.routes:
            listed = _list_prices(route.provider, route.model, when)
            if listed is not None:
                yield model, route, listed


def _list_prices(provider: str, model: str, when: datetime) -> Any:
    """The list's prices of a provider's model on a day; None if it has none."""
    try:
        from genai_prices.data_snapshot import get_snapshot
    except ModuleNotFoundError as error:
        raise FailureError("The price list is not installed. Run: pip install genai-prices") from error
    try:
        _, model_info = get_snapshot().find_provider_model(model, None, provider, None)
    except LookupError:
        return None
    return model_info.get_prices(when)


def _tiers(listed: Any) -> Iterator[int]:
    """The first number of input tokens of each tier of the list, which has the last one of the tier below."""
    for name in _LIST_FIELDS.values():
        for tier in getattr(getattr(listed, name, None), "tiers", ()):
            yield tier.start + 1


def _list_prices_at(listed: Any, input_tokens: int) -> dict[str, Decimal]:
    """The list's prices of a task with `input_tokens` tokens of input, by unit of the catalogue."""
    prices = {}
    for unit, name in _LIST_FIELDS.items():
        price = getattr(listed, name, None)
        for tier in getattr(price, "tiers", ()):
            if input_tokens > tier.start:
                prices[unit] = tier.price
        if price is not None and unit not in prices:
            prices[unit] = getattr(price, "base", price)
    return prices


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
