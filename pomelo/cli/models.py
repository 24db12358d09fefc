"""`pomelo models`: lists the models that a key may use."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import typer

from pomelo.cli.terminal import (
    Ca,
    Config,
    Json,
    Key,
    Target,
    format_time,
    print_json,
    print_pages,
    task_type_name,
    value_name,
)
from pomelo.money import format_credits

if TYPE_CHECKING:
    from pomelo.gen.v1.model_service_pb2 import Model

_UNITS = {
    "million_input_tokens": "1M input tokens",
    "million_cached_input_tokens": "1M cached",
    "million_cache_write_input_tokens": "1M cache write",
    "million_cache_write_1h_input_tokens": "1M cache write for 1 h",
    "million_output_tokens": "1M output tokens",
    "image": "image",
    "megapixel": "megapixel",
    "thousand_characters": "1,000 characters",
    "audio_minute": "minute",
    "audio_hour": "hour",
    "provider_dollar": "US$ that the provider reports, instead",
}


def models(
    config: Config = None, target: Target = None, ca: Ca = None, key: Key = None, as_json: Json = False
) -> None:
    """List models and their prices, in credits."""
    from pomelo.cli.client import find_key, new_call, open_client
    from pomelo.server.remote import open_remote
    from pomelo.service import list_all_models
    from pomelo.settings import load

    settings = load(config)

    async def list_models() -> list[Model]:
        async with open_client(open_remote, settings, target, ca) as services:
            return await list_all_models(services.models, new_call(find_key(settings, key)))

    found = asyncio.run(list_models())
    if as_json:
        from gateway.objects import render_model

        print_json([render_model(model) for model in found])
        return
    header = ["MODEL", "TYPE", "PRICE", "AVAILABLE"]
    rows = [
        [model.id, task_type_name(model.task_type), _prices(model), "yes" if model.available else "no"]
        for model in found
    ]
    if any(model.HasField("retire_time") for model in found):
        header.append("RETIRES")
        for row, model in zip(rows, found, strict=True):
            row.append((format_time(model, "retire_time") or "")[:10])
    print_pages(header, [rows])
    if not all(model.available for model in found):
        typer.echo("Not available: no provider of the model is configured. Run: pomelo doctor", err=True)


def _prices(model: Model) -> str:
    """Returns all prices of a model; those of a tier follow the number of tokens from which they apply."""
    tiers = [
        f"; from {tier.min_input_tokens:,} input tokens: " + " + ".join(map(_price, tier.prices))
        for tier in model.price_tiers
    ]
    return " + ".join(map(_price, model.prices)) + "".join(tiers)


def _price(price: Any) -> str:
    from pomelo.gen.v1.model_service_pb2 import PriceUnit

    unit = value_name(PriceUnit, price.unit)
    return f"{format_credits(price.amount_micros)}/{_UNITS.get(unit, unit)}"
