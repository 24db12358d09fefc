"""`pomelo models` and `pomelo prices check` as processes."""

from __future__ import annotations

from pathlib import Path

from tests.integration.commands import pomelo, pomelo_json
from tests.serving import Served

CHECK = ("prices", "check", "--at", "2026-11-26")


async def test_models_are_listed_with_their_prices(served: Served, tmp_path: Path) -> None:
    settings = {"POMELO_DATA": str(served.data), "POMELO_GRPC": f"127.0.0.1:{served.grpc_port}"}
    table = await pomelo(tmp_path, "models", **settings)
    assert "gpt-4-turbo" in table.out
    assert "4/1M input tokens + 0.4/1M cached + 5/1M cache write + 20/1M output tokens" in table.out
    listed = await pomelo_json(tmp_path, "models", **settings)
    assert len(listed) == 14
    task_types = {"text", "image", "text-to-speech", "speech-to-speech", "speech-to-text"}
    assert {model["type"] for model in listed} == task_types
    assert all(model["price"] and model["available"] for model in listed)


async def test_differences_are_printed_with_their_notes(tmp_path: Path) -> None:
    result = await pomelo(tmp_path, *CHECK)
    assert result.status == 0
    assert "mistralai/mixtral-8x7b-instruct" in result.out
    rows = await pomelo_json(tmp_path, *CHECK)
    assert all(row["note"] for row in rows)
    assert rows[0]["price"] == "0.54"


async def test_a_wrong_price_in_the_operators_catalogue_has_status_1(tmp_path: Path) -> None:
    row = (
        '[models.gpt-4]\ntype = "text"\nlimits = { max_input_tokens = 9, max_output_tokens = 9 }\n'
        'price = { million_input_tokens = "3", million_output_tokens = "20" }\nprice_version = "1"\n'
        '[[models.gpt-4.routes]]\nprovider = "openai"\nmodel = "gpt-5.6-sol"\n'
    )
    (tmp_path / "own.toml").write_text(row)
    result = await pomelo(tmp_path, *CHECK, POMELO_CATALOG=str(tmp_path / "own.toml"))
    assert result.status == 1
    assert "million_input_tokens from 272,001 tokens" in result.out
    result = await pomelo(tmp_path, "prices", "check", "--at", "soon")
    assert result.status == 2
    assert "Invalid value for --at: must be a day such as 2026-11-26" in result.error
