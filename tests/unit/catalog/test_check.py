"""Wrong rows of a catalogue file are refused with their key, and rows at the ends of a range are accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.catalog.catalog import CatalogError
from tests.unit.catalog.entries import entry, load


def limited(limits: str) -> str:
    return entry("x").replace("max_characters = 100", limits)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            entry("x", more="retires = 2027-01-01\ndeprecated = 2027-01-02"),
            "models.x.deprecated: must not be",
        ),
        (entry("x", more="retires = 1999-12-31"), "models.x.retires: must be a date from 2000 to 2999"),
        (entry("x", more="retires = 3000-01-01"), "models.x.retires: must be a date from 2000 to 2999"),
        (entry("x", more='retires = "2027-02-30"'), "models.x.retires: is not a valid date: 2027-02-30"),
        (entry("x", more="retires = 2027-01-01T00:00:00"), "models.x.retires: must be a date"),
        (entry("x", more="n = 9223372036854775808"), "models.x.n: is beyond 64 bits"),
        (entry("x", more="n = -9223372036854775809"), "models.x.n: is beyond 64 bits"),
        (entry("x", more="n = [[nan]]"), "models.x.n[0][0]: is not finite"),
        (
            entry("x", more="price_not = 'x'"),
            "models.x.price_not: is an unknown key. Did you mean price_note?",
        ),
        (limited("max_characters = 0"), "models.x.limits.max_characters: must be at least 1, not 0"),
        (
            limited("max_characters = 2147483648"),
            "models.x.limits.max_characters: must be at most 2,147,483,647",
        ),
        (limited(""), "models.x.limits.max_characters: is missing"),
        (
            limited("max_characters = 1, max_audio_seconds = 1"),
            "models.x.limits.max_audio_seconds: is not a limit of type image",
        ),
        *[
            (
                entry("x", task_type, f'drop = ["{name}"]'),
                f"routes[0].drop: {name} can't be left out of a task",
            )
            for task_type, names in (
                ("text", ("messages", "max_tokens")),
                ("image", ("prompt",)),
                ("text_to_speech", ("text", "voice")),
                ("speech_to_text", ("audio",)),
            )
            for name in names
        ],
        (
            entry("x", route='drop = ["sed"]'),
            "routes[0].drop: no parameter of image is called sed. Did you mean seed?",
        ),
        (entry("x", "text", "clamp = { max_tokens = [0, 9] }"), "clamp.max_tokens: must be at least 1"),
        (entry("x", route="clamp = { seed = [0, 1.5] }"), "clamp.seed: seed is a whole number"),
        (entry("x", route="clamp = { prompt = [0, 1] }"), "clamp.prompt: prompt is not a number"),
        (entry("x", route="clamp = { seed = [2, 1] }"), "clamp.seed: must have the minimum first"),
        (entry("x", route="clamp = { seed = [1, 2, 0] }"), "clamp.seed: must have a third number above 0"),
        (entry("x", route="clamp = { seed = [1] }"), "clamp.seed: must be two numbers"),
        (entry("x", route="clamp = { seed = [true, 1] }"), "clamp.seed: must be two numbers"),
        (
            entry("x", route="clamp = { guidance_scale = [0, inf] }"),
            "clamp.guidance_scale: must be two numbers",
        ),
        (
            entry("x", route="clamp = { guidance_scale = [nan, 1] }"),
            "clamp.guidance_scale: must be two numbers",
        ),
        (entry("x", "text", "efforts = []"), "routes[0].efforts: must be a list of at least one"),
        (
            entry("x", "text", 'efforts = ["hgh"]'),
            "routes[0].efforts[0]: must be reasoning efforts. Did you mean high?",
        ),
        (entry("x", route='efforts = ["high"]'), "routes[0].efforts: is not a key of image"),
        *[
            (entry("x", route=key), f"routes[0].{missing}: is missing beside {key.split()[0]}")
            for key, missing in (
                ('price = { image = "1" }', "price_version"),
                ('price_version = "1"', "price"),
                ("price_tiers = []", "price"),
                ('price_note = "why"', "price"),
            )
        ],
        ('[models." x"]\n', 'models." x": its name must be a name of 1 to 200 printable characters'),
        (entry("n" * 201), "its name must be a name of 1 to 200"),
        ("[hosts]\nh = 3\n", "hosts.h: must be a table, not 3"),
        ("[hosts]\nh = true\n", "hosts.h: must be a table, not true"),
        ("[modles]\n", "modles: is an unknown table. Did you mean models?"),
        ('[voices]\n"A b" = "x"\n"a  B" = "y"\n', 'voices."a  B": is listed twice'),
        ('[voices]\na = "x y"\n', "voices.a: must be a voice's id in quotes"),
        ('[voices]\n" " = "x"\n', 'voices." ": its name must be a name of 1 to 64'),
    ],
)
def test_a_wrong_row_is_refused_with_its_key(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(CatalogError) as caught:
        load(tmp_path, text)
    assert any(fault in str(one) for one in caught.value.faults), str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        entry("x", more="retires = 2027-01-01\ndeprecated = 2027-01-01"),
        *[entry("x", more=f"retires = {day}") for day in ("2000-01-01", "2999-12-31", '"2027-12-31"')],
        *[entry("x", route=f"n = {n}") for n in (2**63 - 1, -(2**63))],
        limited("max_characters = 1"),
        limited("max_characters = 2147483647"),
        entry("x", "text", "clamp = { max_tokens = [1, 9] }"),
        entry("x", route="clamp = { seed = [1, 1], guidance_scale = [1.0, 2, 0.5] }"),
        entry("n" * 200),
    ],
)
def test_a_row_at_the_ends_of_the_ranges_is_accepted(tmp_path: Path, text: str) -> None:
    assert len(load(tmp_path, text).models) == 1
