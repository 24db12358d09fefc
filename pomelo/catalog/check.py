"""Checks a catalogue file, and reports all errors with their lines and remedies.

The options of providers are checked by `pomelo.providers.registry`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from pomelo.catalog import voice_names
from pomelo.catalog.pricing import parse_prices
from pomelo.catalog.rows import (
    EXAMPLES,
    INT64,
    ModelRow,
    check_name,
    describe,
    parse_date,
    row_faults,
    suggest,
)
from pomelo.catalog.task_types import TASK_TYPE_ROWS
from pomelo.catalog.toml_file import Fault, Keys, TomlFile
from pomelo.gen.v1.speech_pb2 import VoiceSettings
from pomelo.gen.v1.task_pb2 import TaskSpec

_REQUIRED = frozenset(("messages", "prompt", "text", "voice", "audio", "max_tokens"))
"""Parameters that no route can drop: a task needs them, or they limit its cost."""

_FLOATS = frozenset((FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT))
_INTEGERS = frozenset((FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64))


def check(file: TomlFile) -> list[Fault]:
    """All errors in a file, in the order of its lines."""
    if file.unreadable is not None:
        return [file.fault((), file.unreadable[1])]
    faults = [*_top_level_faults(file), *_voice_faults(file), *_number_faults(file, (), file.table)]
    for name, row in tables(file, "hosts"):
        faults += _name_faults(file, ("hosts", name), name) + _table_faults(file, ("hosts", name), row)
    for name, row in tables(file, "models"):
        keys = ("models", name)
        faults += _name_faults(file, keys, name) + row_faults(file, keys, ModelRow, row)
        task_type = row.get("type") if isinstance(row, dict) else None
        if isinstance(task_type, str) and task_type in TASK_TYPE_ROWS:
            faults += _model_faults(file, keys, row, task_type)
            faults += _price_faults(file, keys, row, task_type)
    faults += _alias_faults(file)
    return sorted(faults, key=lambda fault: fault.line)


def tables(file: TomlFile, section: str) -> list[tuple[str, Any]]:
    """The names and rows of the section `models` or `hosts`, or `voices`; a wrong row may be of any type."""
    rows = file.table.get(section)
    return list(rows.items()) if isinstance(rows, dict) else []


def _list(row: Any, key: str) -> list[Any]:
    """The list at a key of a row; empty if either has a wrong type."""
    value = row.get(key) if isinstance(row, dict) else None
    return value if isinstance(value, list) else []


def routes(row: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The routes of a model's row that are tables, with their indexes."""
    for index, route in enumerate(_list(row, "routes")):
        if isinstance(route, dict):
            yield index, route


def _top_level_faults(file: TomlFile) -> list[Fault]:
    known = ("models", "hosts", "voices")
    faults = [
        file.fault((key,), f"is an unknown table. {suggest(key, known)}")
        for key in file.table
        if key not in known
    ]
    for key in known:
        faults += _table_faults(file, (key,), file.table.get(key, {}))
    return faults


def _table_faults(file: TomlFile, keys: Keys, value: Any) -> list[Fault]:
    if isinstance(value, dict):
        return []
    return [file.fault(keys, f"must be a table, not {describe(value)}")]


def _name_faults(file: TomlFile, keys: Keys, name: str) -> list[Fault]:
    try:
        check_name(name)
    except ValueError as error:
        return [file.fault(keys, f"its name {error}")]
    return []


def _alias_faults(file: TomlFile) -> Iterator[Fault]:
    """Aliases that are the name or an alias of another model in the same file."""
    models = tables(file, "models")
    owners = {name: name for name, _ in models}
    for name, row in models:
        for index, alias in enumerate(_list(row, "aliases")):
            if isinstance(alias, str) and owners.setdefault(alias, name) != name:
                keys = ("models", name, "aliases", index)
                yield file.fault(keys, f"is a name of {owners[alias]}, too. Remove one of them")


def _voice_faults(file: TomlFile) -> list[Fault]:
    faults: list[Fault] = []
    seen: set[str] = set()
    for name, voice_id in tables(file, "voices"):
        keys = ("voices", name)
        if not voice_names.is_name(name):
            expected = f"a name of 1 to {voice_names.MAX_LENGTH} printable characters, not only spaces"
            faults.append(file.fault(keys, f"its name must be {expected}"))
        if voice_names.normalize(name) in seen:
            faults.append(
                file.fault(keys, "is listed twice: capitals and spaces make no difference. Remove one")
            )
        seen.add(voice_names.normalize(name))
        if not isinstance(voice_id, str) or not voice_names.is_id(voice_id):
            example = EXAMPLES["voices"]
            faults.append(file.fault(keys, f"must be a voice's id in quotes. Write, for example: {example}"))
    return faults


def _number_faults(file: TomlFile, keys: Keys, value: Any) -> Iterator[Fault]:
    """Errors of numbers that no protocol or store supports. Limits have a stricter check."""
    if isinstance(value, int) and not -INT64 <= value < INT64 and "limits" not in keys:
        yield file.fault(keys, "is beyond 64 bits. Write a smaller number")
    if isinstance(value, float) and not isfinite(value):
        yield file.fault(keys, "is not finite, which JSON does not support. Write a finite number")
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from _number_faults(file, (*keys, key), child)


def _model_faults(file: TomlFile, keys: Keys, row: Mapping[str, Any], task_type: str) -> Iterator[Fault]:
    """Errors in the relations between the keys of a model."""
    yield from _limit_faults(file, keys, row.get("limits", {}), task_type)
    if _is_after(row.get("deprecated"), row.get("retires")):
        yield file.fault((*keys, "deprecated"), "must not be after retires. Write an earlier date")
    known = parameters(task_type)
    for index, route in routes(row):
        route_keys = (*keys, "routes", index)
        for key in ("drop", "clamp"):
            names = route.get(key, ())
            for name in names if isinstance(names, list | dict) else ():
                if isinstance(name, str) and name not in known:
                    optional = sorted(known.keys() - _REQUIRED)
                    yield file.fault(
                        (*route_keys, key),
                        f"no parameter of {task_type} is called {name}. {suggest(name, optional)}",
                    )
        yield from _drop_and_clamp_faults(file, route_keys, route, known)
        if "efforts" in route and "reasoning_effort" not in known:
            yield file.fault((*route_keys, "efforts"), f"is not a key of {task_type}. Remove it")
        for key, required_key in (
            ("price", "price_version"),
            ("price_version", "price"),
            ("price_tiers", "price"),
            ("price_note", "price"),
        ):
            if key in route and required_key not in route:
                message = f"is missing beside {key}. Add {EXAMPLES[required_key]}"
                yield file.fault((*route_keys, required_key), message)


def _drop_and_clamp_faults(
    file: TomlFile, route_keys: Keys, route: Mapping[str, Any], known: Mapping[str, int]
) -> Iterator[Fault]:
    clamp = route.get("clamp")
    for name in _list(route, "drop"):
        if isinstance(name, str) and name in _REQUIRED & known.keys():
            yield file.fault((*route_keys, "drop"), f"{name} can't be left out of a task. Remove it here")
    for name, values in clamp.items() if isinstance(clamp, dict) else ():
        cpp_type = known.get(name)
        if cpp_type is not None and cpp_type not in _FLOATS | _INTEGERS:
            yield file.fault((*route_keys, "clamp", name), f"{name} is not a number. Remove it here")
        elif cpp_type in _INTEGERS and any(
            isinstance(value, float) and isfinite(value) and value != int(value)
            for value in (values if isinstance(values, list) else ())
        ):
            yield file.fault((*route_keys, "clamp", name), f"{name} is a whole number. Write whole numbers")
        elif (
            name == "max_tokens"
            and isinstance(values, list)
            and any(isinstance(value, int | float) and value < 1 for value in values[:2])
        ):
            yield file.fault(
                (*route_keys, "clamp", name), "must be at least 1. Write, for example: [1, 4_096]"
            )


def _limit_faults(file: TomlFile, keys: Keys, limits: Any, task_type: str) -> Iterator[Fault]:
    if not isinstance(limits, dict):
        return
    required = TASK_TYPE_ROWS[task_type].limits
    for name in required:
        if name not in limits:
            yield file.fault(
                (*keys, "limits", name),
                f"is missing: a model of type {task_type} needs it. Add {EXAMPLES[name]}",
            )
    for name in limits:
        if name not in required:
            yield file.fault(
                (*keys, "limits", name), f"is not a limit of type {task_type}. {suggest(name, required)}"
            )


def _price_faults(file: TomlFile, keys: Keys, row: Mapping[str, Any], task_type: str) -> Iterator[Fault]:
    priced = [(keys, row), *(((*keys, "routes", index), route) for index, route in routes(row))]
    for table_keys, table in priced:
        price, tiers = table.get("price"), table.get("price_tiers", [])
        if not isinstance(price, dict):
            continue
        checks: list[tuple[str, list[Any], str]] = [("price", [], TASK_TYPE_ROWS[task_type].price_example)]
        if isinstance(tiers, list) and all(isinstance(tier, dict) for tier in tiers):
            checks.append(("price_tiers", tiers, EXAMPLES["price_tiers"]))
        for key, given, example in checks:
            try:
                parse_prices(price, given, task_type)
            except ValueError as error:
                yield file.fault((*table_keys, key), f"{error}. Write, for example: {example}")
                break


def _is_after(one: Any, other: Any) -> bool:
    try:
        return parse_date(one) > parse_date(other)
    except ValueError:
        return False


def parameters(task_type: str) -> Mapping[str, int]:
    """The names of the input fields of a task type, including those of voice_settings and, for text, the end
    user's id, with their protobuf C++ types."""
    message = TaskSpec.DESCRIPTOR.fields_by_name[task_type].message_type
    assert message is not None
    types = {field.name: field.cpp_type for field in message.fields}
    if "voice_settings" in types:
        types |= {field.name: field.cpp_type for field in VoiceSettings.DESCRIPTOR.fields}
    if task_type == "text":
        types["user"] = TaskSpec.DESCRIPTOR.fields_by_name["user"].cpp_type
    return types
