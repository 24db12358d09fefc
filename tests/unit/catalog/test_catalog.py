"""The catalogue has all promised models, and refuses models that can't be billed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from pomelo.catalog.catalog import Catalog, CatalogError, Route
from pomelo.catalog.pricing import Prices
from pomelo.catalog.toml_file import Fault, TomlFile
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.tasks import TASK_TYPES
from tests.unit.catalog.entries import LIMITS, UNITS, entry, load

MODELS = """
gpt-4 gpt-4-turbo gpt-3.5-turbo claude-3-opus claude-3-sonnet claude-3-haiku mixtral-8x7b mixtral-8x22b
flux-1-pro flux-1-dev flux-1-schnell eleven-labs-tts eleven-labs-sts eleven-labs-stt
"""


def test_all_fourteen_models_have_a_task_type_a_route_and_a_dated_price() -> None:
    models = Catalog.load().models
    assert sorted(MODELS.split()) == list(models)
    for model in models.values():
        assert model.task_type in TASK_TYPES
        assert model.routes
        assert all(micros > 0 for micros in model.prices.units.values())
        assert len(model.price_version) == len("2026-11-22")


def test_prices_are_whole_microcredits() -> None:
    model = Catalog.load().by_any_name["flux-1-dev"]
    assert model.prices.units == {PriceUnit.PRICE_UNIT_IMAGE: 25_000}


@pytest.mark.parametrize(
    "price", ["", 'image = "0"', 'image = "0.0000001"', 'image = "-1"', 'banana = "1"', 'image = "x"']
)
def test_a_model_that_cannot_be_billed_is_refused_by_name(tmp_path: Path, price: str) -> None:
    with pytest.raises(ValueError, match=r"catalog.toml:5: models\.x\.price: "):
        load(tmp_path, entry("x", price=price or " "))


def test_the_smallest_price_is_a_microcredit(tmp_path: Path) -> None:
    catalog = load(tmp_path, entry("x", price='image = "0.000001"'))
    assert catalog.by_any_name["x"].prices == Prices({PriceUnit.PRICE_UNIT_IMAGE: 1})


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
    row = entry("x", route='price = { image = "2" }\nprice_version = "2026-11-23"')
    (route,) = (model := load(tmp_path, row).models["x"]).routes
    assert model.prices_for(route) == (Prices({PriceUnit.PRICE_UNIT_IMAGE: 2_000_000}), "2026-11-23")
    own = (Prices({PriceUnit.PRICE_UNIT_IMAGE: 1_000_000}), "2026-11-22")
    assert model.prices_for(replace(route, prices=Prices())) == own


def test_a_voice_setting_is_a_parameter(tmp_path: Path) -> None:
    catalog = load(tmp_path, entry("x", "text_to_speech", 'drop = ["style", "voice_settings"]'))
    assert catalog.models["x"].routes[0].drop == {"style", "voice_settings"}


TIERED = entry("x", "text", more="price_tiers = TIERS")


@pytest.mark.parametrize("task_type", UNITS)
def test_tasks_of_every_type_may_be_billed_by_the_reported_cost(tmp_path: Path, task_type: str) -> None:
    row = entry("x", task_type, price=f'{UNITS[task_type]} = "1", provider_dollar = "1.1"')
    prices = load(tmp_path, row).models["x"].prices
    assert prices.units[PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR] == 1_100_000
    assert prices.bills_reported_cost()


def test_a_tier_without_a_price_for_a_unit_uses_the_price_of_the_lower_tier(tmp_path: Path) -> None:
    tiers = (
        '[{ from_input_tokens = 100, million_output_tokens = "2", million_input_tokens = "0.5" },'
        ' { from_input_tokens = 200, million_output_tokens = "3" }]'
    )
    prices = load(tmp_path, TIERED.replace("TIERS", tiers)).models["x"].prices
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
        *[entry("x", task_type, unit="provider_dollar") for task_type in LIMITS],
        entry("x", price='image = "0", provider_dollar = "1"'),
        entry("x", price='image = "1", provider_dollar = "0"'),
        entry("x", price='image = "1", provider_dollar = "-1"'),
        TIERED.replace("TIERS", '[{ from_input_tokens = 0, million_output_tokens = "2" }]'),
        TIERED.replace("TIERS", '[{ from_input_tokens = "9", million_output_tokens = "2" }]'),
        TIERED.replace("TIERS", '[{ million_output_tokens = "2" }]'),
        TIERED.replace("TIERS", '[{ from_input_tokens = 9, image = "2" }]'),
        TIERED.replace("TIERS", "[{ from_input_tokens = 9 }, { from_input_tokens = 9 }]"),
        entry("x", more="price_tiers = [{ from_input_tokens = 9 }]"),
    ],
)
def test_a_price_that_would_never_be_charged_is_refused(tmp_path: Path, row: str) -> None:
    with pytest.raises(ValueError, match=r"catalog.toml:\d+: models\.x\.(routes\[0\]\.)?price"):
        load(tmp_path, row)


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


ROUTES = [("a", "2027-01-31"), ("b", "2027-03-31")]


@pytest.mark.parametrize(
    ("row", "routes", "retires", "deprecated"),
    [
        ("", [], None, None),
        ("", ROUTES, date(2027, 3, 31), date(2027, 1, 30)),
        ("", [*ROUTES, ("c", "")], None, None),
        ("retires = 2027-05-31", ROUTES, date(2027, 5, 31), date(2027, 4, 1)),
        ("deprecated = 2026-12-01", ROUTES, date(2027, 3, 31), date(2026, 12, 1)),
    ],
)
def test_a_model_ends_with_its_last_route_and_is_announced_sixty_days_before(
    tmp_path: Path, row: str, routes: list[tuple[str, str]], retires: date | None, deprecated: date | None
) -> None:
    text = entry("x", more=row).partition("[[models.x.routes]]")[0]
    for name, day in routes or [("a", "")]:
        text += f'[[models.x.routes]]\nprovider = "p"\nmodel = "{name}"\n'
        text += f"retires = {day}\n" if day else ""
    model = load(tmp_path, text).models["x"]
    assert (model.retires, model.deprecated) == (retires, deprecated)


def test_the_keys_of_a_route_that_the_catalogue_does_not_read_are_its_options(tmp_path: Path) -> None:
    row = """
speed = 1
retires = 2027-01-31
drop = ["seed"]
clamp = { width = [256, 1440], height = [256, 1440, 32] }
price = { image = "2" }
price_version = "2026-11-27"
price_note = "a contract"
"""
    (route,) = load(tmp_path, entry("x", route=row)).models["x"].routes
    assert route.options == {"speed": 1}
    assert route.clamp == {"width": (256, 1440, 0), "height": (256, 1440, 32)}
    assert (route.price_version, route.price_note) == ("2026-11-27", "a contract")


def test_the_operators_voices_are_options_of_the_routes_of_speech_models(tmp_path: Path) -> None:
    voices = '[voices]\n"My  Voice" = "id1"\n'
    catalog = load(tmp_path, entry("x", "text_to_speech", "speed = 1") + entry("y") + voices)
    assert catalog.models["x"].routes[0].options == {"speed": 1, "voices": {"my voice": "id1"}}
    assert catalog.models["y"].routes[0].options == {}


def test_all_errors_of_all_files_are_reported_in_order(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text(entry("y", price="a = 1") + entry("x", price="b = 1"))

    def check(files: Sequence[TomlFile]) -> list[Fault]:
        return [files[0].fault(("models", "x", "routes", 0), "is wrong")]

    with pytest.raises(CatalogError) as caught:
        Catalog.load(tmp_path / "one.toml", tmp_path / "two.toml", check=check)
    lines = [line.removeprefix(f"{tmp_path}/").split(": ")[0] for line in str(caught.value).split("\n")]
    assert lines == ["one.toml:5", "one.toml:16", "one.toml:19", "two.toml:5", "two.toml:16"]
    assert "models.x.routes[0]: is wrong" in str(caught.value)


# --- aliases


def test_a_model_is_found_by_its_aliases_and_listed_by_its_name(tmp_path: Path) -> None:
    catalog = load(tmp_path, entry("x", more='aliases = ["vendor/x", "x-2"]') + entry("y"))
    assert list(catalog.models) == ["x", "y"]
    for alias in ("vendor/x", "x-2"):
        found = catalog.by_any_name[alias]
        assert (found.name, found.alias) == ("x", alias)
    assert catalog.by_any_name["x"].alias == ""


def test_a_name_wins_over_an_alias_and_a_later_alias_over_an_earlier_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(entry("x", more='aliases = ["mine", "theirs"]'))
    two.write_text(entry("a", more='aliases = ["theirs"]') + entry("mine"))
    catalog = Catalog.load(one, two)
    assert catalog.by_any_name["mine"].name == "mine"
    assert catalog.by_any_name["theirs"].name == "a"


@pytest.mark.parametrize("alias", ["y", "z"])
def test_two_models_of_a_file_do_not_share_a_name(tmp_path: Path, alias: str) -> None:
    rows = entry("x", more=f'aliases = ["{alias}"]') + entry("y", more='aliases = ["z"]')
    with pytest.raises(
        CatalogError, match=r"catalog.toml:\d+: models\.[xy]\.aliases\[0\]: is a name of [xy], too"
    ):
        load(tmp_path, rows)


def test_the_names_of_the_vendors_find_the_models_that_they_serve() -> None:
    catalog = Catalog.load()
    for model in catalog.models.values():
        served = {route.model for route in model.routes}
        assert set(model.aliases) <= served
