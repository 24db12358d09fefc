"""The catalogue has all promised models, and refuses models that can't be billed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pomelo.catalog.catalog import Catalog, Route
from pomelo.catalog.pricing import Prices
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.tasks import TASK_TYPES

TEXT = ["gpt-4", "gpt-4-turbo", "gpt-3.5-turbo", "claude-3-opus", "claude-3-sonnet", "claude-3-haiku"]
TEXT += ["mixtral-8x7b", "mixtral-8x22b"]
MEDIA = [
    "flux-1-pro",
    "flux-1-dev",
    "flux-1-schnell",
    "eleven-labs-tts",
    "eleven-labs-sts",
    "eleven-labs-stt",
]


def test_all_fourteen_models_have_a_task_type_a_route_and_a_dated_price() -> None:
    models = Catalog.load().models
    assert sorted(TEXT + MEDIA) == list(models)
    for model in models.values():
        assert model.task_type in TASK_TYPES
        assert model.routes
        assert all(micros > 0 for micros in model.prices.units.values())
        assert len(model.price_version) == len("2026-11-22")


def test_prices_are_whole_microcredits() -> None:
    model = Catalog.load().resolve("flux-1-dev")
    assert model.prices.units == {PriceUnit.PRICE_UNIT_IMAGE: 25_000}


def test_an_unknown_model_is_reported_with_its_name() -> None:
    with pytest.raises(PomeloError, match=r"^Unsupported task type: invalid-model$") as error:
        Catalog.load().resolve("invalid-model")
    assert error.value.code == "unsupported_model"
    with pytest.raises(PomeloError) as error:
        Catalog.load().resolve("x" * 10_000)
    assert len(error.value.message) < 200


ROW = """
[models.x]
type = "image"
price = {{ {price} }}
price_version = "2026-11-22"
{more}
[[models.x.routes]]
provider = "p"
model = "m"
"""


@pytest.mark.parametrize(
    "price", ["", 'image = "0"', 'image = "0.0000001"', 'image = "-1"', 'banana = "1"', 'image = "x"']
)
def test_a_model_that_cannot_be_billed_is_refused_by_name(tmp_path: Path, price: str) -> None:
    path = tmp_path / "catalog.toml"
    limits = "limits = { max_characters = 100 }"
    path.write_text(ROW.format(price=price, more=limits))
    with pytest.raises(ValueError, match=r"catalog.toml:4: models\.x\.price: "):
        Catalog.load(path)
    path.write_text(ROW.format(price='image = "0.000001"', more=limits))
    assert Catalog.load(path).resolve("x").prices == Prices({PriceUnit.PRICE_UNIT_IMAGE: 1})


LIMITS = {
    "text": "max_input_tokens = 100, max_output_tokens = 100",
    "image": "max_characters = 100",
    "text_to_speech": "max_characters = 100",
    "speech_to_speech": "max_audio_seconds = 100",
    "speech_to_text": "max_audio_seconds = 100",
}


def entry(name: str, task_type: str = "image", route: str = "", unit: str = "image") -> str:
    """A row with one route."""
    return f'''
[models.{name}]
type = "{task_type}"
limits = {{ {LIMITS[task_type]} }}
price = {{ {unit} = "1" }}
price_version = "2026-11-22"
[[models.{name}.routes]]
provider = "p"
model = "m"
{route}
'''


def test_a_later_file_adds_entries_and_replaces_those_of_the_same_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(entry("x") + entry("y") + "[hosts.h]\nkey_needed = true\n")
    two.write_text(
        entry("y", "image").replace('"p"', '"q"') + entry("z") + "[hosts.h]\nkey_needed = false\n[hosts.i]\n"
    )
    catalog = Catalog.load(one, two)
    assert list(catalog.models) == ["x", "y", "z"]
    assert catalog.models["y"].routes[0].provider == "q"
    assert catalog.hosts == {"h": {"key_needed": False}, "i": {}}


def test_a_route_may_have_other_prices_than_its_model(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(entry("x", route='price = { image = "2" }\nprice_version = "2026-11-23"'))
    (route,) = (model := Catalog.load(path).models["x"]).routes
    assert model.prices_for(route) == (Prices({PriceUnit.PRICE_UNIT_IMAGE: 2_000_000}), "2026-11-23")
    assert model.prices_for(replace(route, prices=Prices())) == (
        Prices({PriceUnit.PRICE_UNIT_IMAGE: 1_000_000}),
        "2026-11-22",
    )


def test_a_voice_setting_is_a_parameter(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(entry("x", "text_to_speech", 'drop = ["style", "voice_settings"]', "thousand_characters"))
    assert Catalog.load(path).models["x"].routes[0].drop == {"style", "voice_settings"}


TEXT_ROW = entry("x", "text", unit="million_output_tokens")
TIERED = TEXT_ROW.replace("price_version", "price_tiers = {}\nprice_version", 1)


UNITS = {
    "text": "million_output_tokens",
    "image": "image",
    "text_to_speech": "thousand_characters",
    "speech_to_speech": "audio_minute",
    "speech_to_text": "audio_minute",
}


@pytest.mark.parametrize("task_type", UNITS)
def test_tasks_of_every_type_may_be_billed_by_the_reported_cost(tmp_path: Path, task_type: str) -> None:
    unit = UNITS[task_type]
    path = tmp_path / "catalog.toml"
    path.write_text(
        entry("x", task_type, unit=unit).replace(f'{unit} = "1"', f'{unit} = "1", provider_dollar = "1.1"')
    )
    prices = Catalog.load(path).models["x"].prices
    assert prices.units[PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR] == 1_100_000
    assert prices.bills_reported_cost()


def test_a_tier_without_a_price_for_a_unit_uses_the_price_of_the_lower_tier(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    tiers = (
        '[{ from_input_tokens = 100, million_output_tokens = "2", million_input_tokens = "0.5" },'
        ' { from_input_tokens = 200, million_output_tokens = "3" }]'
    )
    path.write_text(TIERED.replace("{}", tiers, 1))
    prices = Catalog.load(path).models["x"].prices
    input_, output = PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS, PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS
    assert prices.units == {output: 1_000_000}
    assert prices.tiers == (
        (100, {output: 2_000_000, input_: 500_000}),
        (200, {output: 3_000_000, input_: 500_000}),
    )


@pytest.mark.parametrize(
    "row",
    [
        entry("x", "text", unit="image"),
        entry("x", "text", unit="thousand_characters"),
        entry("x", "text", unit="million_cached_input_tokens"),
        entry("x", "image", unit="million_output_tokens"),
        entry("x", "text_to_speech", unit="audio_minute"),
        entry("x", "speech_to_speech", unit="thousand_characters"),
        entry("x", "speech_to_text", unit="image"),
        entry("x", "image", route='price = { audio_minute = "1" }\nprice_version = "1"'),
        *[entry("x", task_type, unit="provider_dollar") for task_type in UNITS],
        entry("x").replace('image = "1"', 'image = "0", provider_dollar = "1"'),
        entry("x").replace('image = "1"', 'image = "1", provider_dollar = "0"'),
        entry("x").replace('image = "1"', 'image = "1", provider_dollar = "-1"'),
        TIERED.replace("{}", '[{ from_input_tokens = 0, million_output_tokens = "2" }]', 1),
        TIERED.replace("{}", '[{ from_input_tokens = "9", million_output_tokens = "2" }]', 1),
        TIERED.replace("{}", '[{ million_output_tokens = "2" }]', 1),
        TIERED.replace("{}", '[{ from_input_tokens = 9, image = "2" }]', 1),
        TIERED.replace("{}", "[{ from_input_tokens = 9 }, { from_input_tokens = 9 }]", 1),
        entry("x").replace("price_version", "price_tiers = [{ from_input_tokens = 9 }]\nprice_version", 1),
    ],
)
def test_a_price_that_would_never_be_charged_is_refused(tmp_path: Path, row: str) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(row)
    with pytest.raises(ValueError, match=r"catalog.toml:\d+: models\.x\.(routes\[0\]\.)?price"):
        Catalog.load(path)


CLAMPED = Route(
    "acme",
    "acme-1",
    drop=frozenset(("seed",)),
    clamp={"temperature": (0, 1, 0), "width": (256, 1440, 32), "max_tokens": (1.0, 4096.0, 0)},
)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", 7, None),
        ("top_p", 0.3, 0.3),
        ("temperature", 1.7, 1.0),
        ("temperature", 0.5, 0.5),
        ("width", 1000, 992),
        ("width", 1010, 1024),
        ("width", 10, 256),
        ("width", 9000, 1440),
        ("max_tokens", 9000, 4096),
    ],
)
def test_a_value_is_dropped_or_clamped_and_keeps_its_type(
    name: str, value: float, expected: float | None
) -> None:
    fitted = CLAMPED.fit(name, value)
    assert fitted == expected
    assert expected is None or type(fitted) is type(value)
