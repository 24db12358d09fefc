"""What is wrong in a catalogue file by itself: everything at once, each with its line and a remedy.

What the provider of a row knows of it is checked by `pomelo.providers.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from pomelo.catalog import voice_names
from pomelo.catalog.rows import (
    EXAMPLES,
    INT64,
    LIMITS,
    ModelRow,
    day,
    described,
    meant,
    plain_name,
    row_faults,
)
from pomelo.catalog.toml_file import Fault, Keys, TomlFile
from pomelo.gen.v1.speech_pb2 import VoiceSettings
from pomelo.gen.v1.task_pb2 import Task

_REQUIRED = frozenset(("messages", "prompt", "text", "voice", "audio", "max_tokens"))
"""Parameters that no route can drop: without them there is no task, or no bound of what it costs."""

_NUMBERS = frozenset((FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT))
_WHOLE = frozenset((FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64))

_PRICES: Mapping[str, str] = {
    "text": 'price = { million_input_tokens = "4", million_output_tokens = "20" }',
    "image": 'price = { image = "0.04" }',
    "text_to_speech": 'price = { thousand_characters = "0.08" }',
    "speech_to_speech": 'price = { audio_minute = "0.12" }',
    "speech_to_text": 'price = { audio_minute = "0.12" }',
}
"""What a good price looks like, by task type."""


CheckPrice = Callable[[Any, list[Any], str], object]
"""Reads a price table and the tables of its tiers, for a task type. It raises ValueError."""


def check(file: TomlFile, check_price: CheckPrice) -> list[Fault]:
    """What is wrong in a file, in the order of its lines; everything at once."""
    if file.unreadable is not None:
        return [file.fault((), file.unreadable[1])]
    faults = [*_top(file), *_voices(file), *_large(file, (), file.table)]
    for name, row in tables(file, "hosts"):
        faults += _named(file, ("hosts", name), name) + _table(file, ("hosts", name), row)
    for name, row in tables(file, "models"):
        keys = ("models", name)
        faults += _named(file, keys, name) + row_faults(file, keys, ModelRow, row)
        if isinstance(row, dict):
            faults += [*_model(file, keys, row), *_price_faults(file, keys, row, check_price)]
    return sorted(faults, key=lambda fault: fault.line)


def tables(file: TomlFile, kind: str) -> list[tuple[str, Any]]:
    """The rows of `models` or `hosts` by name; they need not be tables."""
    found = file.table.get(kind)
    return list(found.items()) if isinstance(found, dict) else []


def routes(row: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The routes of a model's row that are tables, with their indexes."""
    found = row.get("routes") if isinstance(row, dict) else None
    for index, route in enumerate(found if isinstance(found, list) else ()):
        if isinstance(route, dict):
            yield index, route


def _top(file: TomlFile) -> list[Fault]:
    known = ("models", "hosts", "voices")
    faults = [
        file.fault((key,), f"is an unknown table. {meant(key, known)}")
        for key in file.table
        if key not in known
    ]
    for key in known:
        faults += _table(file, (key,), file.table.get(key, {}))
    return faults


def _table(file: TomlFile, keys: Keys, value: Any) -> list[Fault]:
    if isinstance(value, dict):
        return []
    return [file.fault(keys, f"must be a table, not {described(value)}")]


def _named(file: TomlFile, keys: Keys, name: str) -> list[Fault]:
    try:
        plain_name(name)
    except ValueError as error:
        return [file.fault(keys, f"its name {error}")]
    return []


def _voices(file: TomlFile) -> list[Fault]:
    faults: list[Fault] = []
    seen: set[str] = set()
    voices = file.table.get("voices")
    for name, voice_id in voices.items() if isinstance(voices, dict) else ():
        keys = ("voices", name)
        if not voice_names.is_name(name):
            said = f"must be a name of 1 to {voice_names.MAX_LENGTH} printable characters, not only spaces"
            faults.append(file.fault(keys, f"its name {said}"))
        if voice_names.plain(name) in seen:
            faults.append(
                file.fault(keys, "is there twice: capitals and spaces make no difference. Remove one")
            )
        seen.add(voice_names.plain(name))
        if not isinstance(voice_id, str) or not voice_names.is_id(voice_id):
            said = "must be a voice's id in quotes. Write, for example: "
            faults.append(file.fault(keys, said + EXAMPLES["voices"]))
    return faults


def _large(file: TomlFile, keys: Keys, value: Any) -> Iterator[Fault]:
    """Integers that no protocol or store can carry. Limits have a bound of their own."""
    if isinstance(value, int) and not -INT64 <= value < INT64 and "limits" not in keys:
        yield file.fault(keys, "is beyond 64 bits. Write a smaller number")
    if isinstance(value, float) and not isfinite(value):
        yield file.fault(keys, "is no number that JSON has. Write a finite one")
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from _large(file, (*keys, key), child)


def _model(file: TomlFile, keys: Keys, row: Mapping[str, Any]) -> Iterator[Fault]:
    """What the types of single keys can't say of a model."""
    task_type = row.get("type")
    if not isinstance(task_type, str) or task_type not in LIMITS:
        return
    yield from _limits(file, keys, row.get("limits", {}), task_type)
    if _is_after(row.get("deprecated"), row.get("retires")):
        yield file.fault((*keys, "deprecated"), "must not be after retires. Write an earlier date")
    known = parameters(task_type)
    for index, route in routes(row):
        place = (*keys, "routes", index)
        for key in ("drop", "clamp"):
            named = route.get(key, ())
            for name in named if isinstance(named, list | dict) else ():
                if isinstance(name, str) and name not in known:
                    optional = sorted(known.keys() - _REQUIRED)
                    yield file.fault(
                        (*place, key),
                        f"no parameter of {task_type} is called {name}. {meant(name, optional)}",
                    )
        yield from _dropped_or_clamped(file, place, route, known)
        for one, other in (
            ("price", "price_version"),
            ("price_version", "price"),
            ("price_tiers", "price"),
            ("price_note", "price"),
        ):
            if one in route and other not in route:
                yield file.fault((*place, other), f"is missing beside {one}. Add {EXAMPLES[other]}")


def _dropped_or_clamped(
    file: TomlFile, place: Keys, route: Mapping[str, Any], known: Mapping[str, int]
) -> Iterator[Fault]:
    drop, clamp = route.get("drop"), route.get("clamp")
    for name in drop if isinstance(drop, list) else ():
        if isinstance(name, str) and name in _REQUIRED & known.keys():
            yield file.fault((*place, "drop"), f"{name} can't be left out of a task. Remove it here")
    for name, values in clamp.items() if isinstance(clamp, dict) else ():
        kind = known.get(name)
        if kind is not None and kind not in _NUMBERS | _WHOLE:
            yield file.fault((*place, "clamp", name), f"{name} is no number. Remove it here")
        elif kind in _WHOLE and any(
            isinstance(value, float) and isfinite(value) and value != int(value)
            for value in (values if isinstance(values, list) else ())
        ):
            yield file.fault((*place, "clamp", name), f"{name} is a whole number. Write whole numbers")
        elif (
            name == "max_tokens"
            and isinstance(values, list)
            and any(isinstance(value, int | float) and value < 1 for value in values[:2])
        ):
            yield file.fault((*place, "clamp", name), "must be at least 1. Write, for example: [1, 4_096]")


def _limits(file: TomlFile, keys: Keys, limits: Any, task_type: str) -> Iterator[Fault]:
    if not isinstance(limits, dict):
        return
    needed = LIMITS[task_type]
    for name in needed:
        if name not in limits:
            yield file.fault(
                (*keys, "limits", name),
                f"is missing: a model of type {task_type} needs it. Add {EXAMPLES[name]}",
            )
    for name in limits:
        if name not in needed:
            yield file.fault(
                (*keys, "limits", name), f"is no limit of type {task_type}. {meant(name, needed)}"
            )


def _price_faults(
    file: TomlFile, keys: Keys, row: Mapping[str, Any], check_price: CheckPrice
) -> Iterator[Fault]:
    task_type = row.get("type")
    if not isinstance(task_type, str) or task_type not in LIMITS:
        return
    priced = [(keys, row), *(((*keys, "routes", index), route) for index, route in routes(row))]
    for place, table in priced:
        price, tiers = table.get("price"), table.get("price_tiers", [])
        if not isinstance(price, dict):
            continue
        said = _price_fault(check_price, price, [], task_type)
        if said:
            yield file.fault((*place, "price"), f"{said}. Write, for example: {_PRICES[task_type]}")
        elif isinstance(tiers, list) and all(isinstance(tier, dict) for tier in tiers):
            said = _price_fault(check_price, price, tiers, task_type)
            if said:
                example = EXAMPLES["price_tiers"]
                yield file.fault((*place, "price_tiers"), f"{said}. Write, for example: {example}")


def _price_fault(check_price: CheckPrice, price: Any, tiers: list[Any], task_type: str) -> str:
    """What is wrong with prices; empty if nothing is."""
    try:
        check_price(price, tiers, task_type)
    except ValueError as error:
        return str(error)
    return ""


def _is_after(one: Any, other: Any) -> bool:
    try:
        return day(one) > day(other)
    except ValueError:
        return False


def parameters(task_type: str) -> Mapping[str, int]:
    """The names of what a caller may give to a task, those within voice_settings among them, and the C++ type
    that protobuf has for each."""
    message = Task.DESCRIPTOR.fields_by_name[task_type].message_type
    assert message is not None
    found = {field.name: field.cpp_type for field in message.fields}
    if "voice_settings" in found:
        found |= {field.name: field.cpp_type for field in VoiceSettings.DESCRIPTOR.fields}
    return found
