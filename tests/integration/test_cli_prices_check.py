"""`pomelo prices check` as a process."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.commands import pomelo


async def test_differences_are_printed_with_their_notes(tmp_path: Path) -> None:
    result = await pomelo(tmp_path, "prices", "check", "--at", "2026-11-26")
    assert result.status == 0
    assert "mistralai/mixtral-8x7b-instruct" in result.out
    rows = json.loads((await pomelo(tmp_path, "prices", "check", "--at", "2026-11-26", "--json")).out)
    assert all(row["note"] for row in rows)
    assert rows[0]["price"] == "0.54"


async def test_a_wrong_price_in_the_operators_catalogue_has_status_1(tmp_path: Path) -> None:
    row = (
        '[models.gpt-4]\ntype = "text"\nlimits = { max_input_tokens = 9, max_output_tokens = 9 }\n'
        'price = { million_input_tokens = "3", million_output_tokens = "20" }\nprice_version = "1"\n'
        '[[models.gpt-4.routes]]\nprovider = "openai"\nmodel = "gpt-5.6-sol"\n'
    )
    (tmp_path / "own.toml").write_text(row)
    result = await pomelo(
        tmp_path, "prices", "check", "--at", "2026-11-26", POMELO_CATALOG=str(tmp_path / "own.toml")
    )
    assert result.status == 1
    assert "million_input_tokens from 272,001 tokens" in result.out
    result = await pomelo(tmp_path, "prices", "check", "--at", "soon")
    assert (result.status, result.error) == (1, "pomelo: --at must be a day such as 2026-11-26\n")
