"""The tables of fields in the REST API's documentation equal the table of field rules."""

from __future__ import annotations

import re
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import pytest

from gateway.openapi.document import document
from gateway.types import TASK_FORMATS
from pomelo.accounts.plans import BUILTIN
from pomelo.catalog.catalog import Catalog
from pomelo.fields import MAX_PARTS, MAX_TOTAL_PARTS, VOICE_SETTINGS_FIELDS, FieldRule, Rules
from pomelo.gen.v1.task_pb2 import TaskType

PAGE = Path(__file__).parents[2] / "docs" / "rest-api.md"
QUALIFIERS: dict[int, str] = {
    TaskType.TASK_TYPE_TEXT: "text",
    TaskType.TASK_TYPE_IMAGE: "image",
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: "speech",
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: "speech",
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: "transcription",
}
"""What the documentation writes in parentheses after a field's name if its rule differs between task types."""


def table(header: str) -> list[list[str]]:
    """The rows of the table whose first line is `header`, each as its cells."""
    lines = dropwhile(lambda line: line != header, PAGE.read_text().splitlines())
    rows = [line.strip("| ").split(" | ") for line in takewhile(lambda line: line.startswith("|"), lines)]
    return rows[2:]


MODELS = table("| models | required | optional |")
FIELDS = table("| field | value | default |")


def names(cell: str) -> list[str]:
    """The names in backquotes."""
    return re.findall(r"`([\w.]+)`", cell)


def nested(rules: Rules, prefix: str = "") -> dict[str, FieldRule]:
    """The rules by field, with those of the fields of objects."""
    found = {prefix + name: rule for name, rule in rules.items()}
    for name, rule in rules.items():
        found |= nested(rule.fields or {}, f"{name}.")
    return found


RULES = [
    pytest.param(task_type, name, rule, id=f"{task_format.name}-{name}")
    for task_type, task_format in TASK_FORMATS.items()
    for name, rule in nested(task_format.rules).items()
]


def row(task_type: int, name: str) -> tuple[str, str]:
    """The value and the default that are documented for a field."""
    found = []
    for field, value, default in FIELDS:
        qualifier = re.search(r"\((.+)\)", field)
        if name in names(field) and (not qualifier or QUALIFIERS[task_type] in qualifier[1].split(", ")):
            found.append((value, default))
    assert len(found) == 1, f"{name} has {len(found)} rows"
    return found[0]


def bounds(value: str) -> tuple[float | None, float | None]:
    """The first range in a text, such as "0 to 2", "from 1" or "up to 4"."""
    number = r"(-?\d[\d,]*(?:\.\d+)?)"
    match = re.search(rf"{number} to {number}|from {number}|up to {number}", value)
    if match is None:
        return None, None
    first, last, only_minimum, only_maximum = (
        None if each is None else float(each.replace(",", "")) for each in match.groups()
    )
    return first if only_minimum is None else only_minimum, last if only_maximum is None else only_maximum


def choices(value: str) -> list[str]:
    """The values in backquotes; `a_{1,2}` stands for two of them."""
    found = []
    for stem, endings in re.findall(r"`(\w+)(?:\{([\w,]+)\})?`", value):
        found += [stem + ending for ending in endings.split(",")]
    return found


def default_value(cell: str) -> Any:
    """The value that a cell gives in backquotes, as a number or as a boolean; None for prose."""
    if cell.startswith("`"):
        return cell.strip("`")
    if cell in ("true", "false"):
        return cell == "true"
    return int(cell) if cell.isdecimal() else None


@pytest.mark.parametrize("task_type", TASK_FORMATS)
def test_required_and_optional_fields_of_every_model_are_those_of_the_table(task_type: int) -> None:
    models = {model.name for model in Catalog.load().models.values() if model.task_type == task_type}
    (cells,) = [cells for cells in MODELS if models & set(cells[0].split(", "))]
    rules = TASK_FORMATS[task_type].rules
    assert set(cells[0].split(", ")) == models
    assert set(names(cells[1])) == {name for name, rule in rules.items() if rule.required}
    assert set(names(cells[2])) == {name for name, rule in rules.items() if not rule.required} | {"stream"}


@pytest.mark.parametrize(("task_type", "name", "rule"), RULES)
def test_range_choices_and_default_of_a_field_are_those_of_the_table(
    task_type: int, name: str, rule: FieldRule
) -> None:
    value, default = row(task_type, name)
    size = rule.max_length if rule.max_length is not None else rule.max_items
    expected = (rule.minimum, rule.maximum) if size is None else (1 if rule.required else None, size)
    assert bounds(value) == expected
    assert (default == "\N{EN DASH}") is rule.required
    assert default_value(default) == rule.default
    if rule.choices:
        assert sorted(choices(value)) == sorted(rule.choices)


def test_the_built_in_plans_are_those_of_the_table() -> None:
    header = "| plan | requests per minute | concurrent tasks | tokens per minute of each text model |"
    plans = [
        [f"`{plan.name}`"]
        + ["\N{EN DASH}" if n is None else f"{n:,}" for n in (plan.requests, plan.concurrent, plan.tokens)]
        for plan in BUILTIN.values()
    ]
    assert table(header) == plans


def test_no_other_fields_are_documented() -> None:
    documented = {name for field, *_ in FIELDS for name in names(field)}
    assert documented == {"stream"}.union(*(nested(each.rules) for each in TASK_FORMATS.values()))


def parameter(name: str) -> str:
    """The name that callers use for a parameter of a route."""
    return f"voice_settings.{name}" if name in VOICE_SETTINGS_FIELDS else name


def ranges(cell: str) -> dict[str, tuple[float, ...]]:
    """The minimum, the maximum and the step (0: none) of each parameter in a cell of ranges."""
    found: dict[str, tuple[float, ...]] = {}
    for item in cell.split("; "):
        numbers = re.search(r" ([\d.]+) to ([\d.]+)(?: in steps of (\d+))?$", item)
        found |= {name: tuple(float(n or 0) for n in numbers.groups()) for name in names(item) if numbers}
    return found


def test_what_models_do_not_take_is_that_of_the_table() -> None:
    documented = {
        model: (set(names(left_out)), ranges(moved))
        for models, left_out, moved in table("| models | left out | moved into the range |")
        for model in models.split(", ")
    }
    routes = {name: model.routes[0] for name, model in Catalog.load().models.items()}
    assert documented == {
        name: (
            {parameter(each) for each in route.drop},
            {parameter(each): clamp for each, clamp in route.clamp.items()},
        )
        for name, route in routes.items()
        if route.drop or route.clamp
    }


@pytest.mark.parametrize(
    ("heading", "schema"), [("## Models", "Model"), ("## Account and usage", "UsageRecord")]
)
def test_the_members_of_an_object_are_those_of_its_tables(heading: str, schema: str) -> None:
    section = PAGE.read_text().partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    documented = {
        name for cell in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE) for name in names(cell)
    }
    assert document("")["components"]["schemas"][schema]["properties"].keys() - {"object"} <= documented


def test_the_maximum_of_parts_is_that_of_the_table() -> None:
    value, _ = row(TaskType.TASK_TYPE_TEXT, "messages")
    assert f"up to {MAX_PARTS:,} parts ({MAX_TOTAL_PARTS:,} in all messages together)" in value
