"""No price of the catalogue differs from the published price list without a reason."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from pomelo.catalog.catalog import BUILTIN, Catalog
from pomelo.cli.prices import differences

WHEN = datetime(2026, 11, 26, tzinfo=UTC)
"""The list may have later prices, which the catalogue need not have."""


def test_every_price_of_text_is_that_of_the_list_or_has_a_note() -> None:
    unexplained = [one for one in differences(Catalog.load(), WHEN) if not one.note]
    assert not unexplained


@pytest.mark.parametrize(
    ("original", "changed", "difference"),
    [
        ('million_cached_input_tokens = "0.4"', 'million_cached_input_tokens = "0.5"', (0, "0.5", "0.4")),
        ('million_cached_input_tokens = "0.4", ', "", (0, None, "0.4")),
        (
            'million_cached_input_tokens = "0.8"',
            'million_cached_input_tokens = "0.9"',
            (272_001, "0.9", "0.8"),
        ),
        ("from_input_tokens = 272_001", "from_input_tokens = 300_000", (272_001, "0.4", "0.8")),
        ("from_input_tokens = 272_001", "from_input_tokens = 272_000", (272_000, "0.8", "0.4")),
    ],
)
def test_a_difference_is_found(
    tmp_path: Path, original: str, changed: str, difference: tuple[int, str | None, str]
) -> None:
    row = BUILTIN.read_text().partition("[models.gpt-4-turbo]")[0]
    assert row.count(original) == 1
    path = tmp_path / "catalog.toml"
    path.write_text(row.replace(original, changed))
    differing = [
        (one.from_input_tokens, one.price and str(one.price), str(one.listed))
        for one in differences(Catalog.load(path), WHEN)
        if one.unit == "million_cached_input_tokens"
    ]
    assert difference in differing


def test_a_note_explains_the_price_of_its_own_row(tmp_path: Path) -> None:
    row = BUILTIN.read_text().partition("[models.gpt-4-turbo]")[0]
    path = tmp_path / "catalog.toml"
    path.write_text(
        row.replace('_output_tokens = "20" }', '_output_tokens = "21" }\nprice_note = "a contract of ours"')
    )
    (one,) = differences(Catalog.load(path), WHEN)
    assert (one.unit, one.note) == ("million_output_tokens", "a contract of ours")
