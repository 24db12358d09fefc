"""`pomelo prices check` as an operator runs it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.commands import pomelo


async def test_differences_are_printed_with_their_reasons(tmp_path: Path) -> None:
    ended = await pomelo(tmp_path, "prices", "check", "--at", "2026-11-26")
    assert ended.status == 0
    assert "mistralai/mixtral-8x7b-instruct" in ended.out
    rows = json.loads((await pomelo(tmp_path, "prices", "check", "--at", "2026-11-26", "--json")).out)
    assert all(row["note"] for row in rows)
    assert rows[0]["price"] == "0.54"


async def test_a_price_of_the_operators_that_is_wrong_ends_it_with_status_1(tmp_path: Path) -> None:
    row = (
        '[models.gpt-4]\ntype = "text"\nlimits = { max_input_tokens = 9, max_output_tokens = 9 }\n'
        'price = { million_input_tokens = "3", million_output_tokens = "20" }\nprice_version = "1"\n'
        '[[models.gpt-4.routes]]\nprovider = "openai"\nmodel = "gpt-5.6-sol"\n'
    )
    (tmp_path / "own.toml").write_text(row)
    ended = await pomelo(
        tmp_path, "prices", "check", "--at", "2026-11-26", POMELO_CATALOG=str(tmp_path / "own.toml")
    )
    assert ended.status == 1
    assert "million_input_tokens from 272,001 tokens" in ended.out
    ended = await pomelo(tmp_path, "prices", "check", "--at", "soon")
    assert (ended.status, ended.error) == (1, "pomelo: --at must be a day such as 2026-11-26\n")
