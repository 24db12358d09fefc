"""An input as one route takes it, and the list of what had to be changed for that.

One place shapes what goes upstream: `fit` applies the route's catalogue row (`drop`, `clamp`, the model's
maximum of tokens) and then what the provider's own hook knows of its API. Adapters send the result as it is,
so what is reported to the caller can't differ from what the vendor gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from pomelo.catalog.catalog import Model, Route
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.task_pb2 import Adjustment

_CONTENT = frozenset(("messages", "prompt", "text", "voice", "audio", "response_format"))
"""Fields that are no parameters of a model: never dropped or clamped."""

_LEFT_OUT = "left out: the model does not take it"


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A field that may be adjusted. `outer` is the field of the input that contains it, if any."""

    descriptor: FieldDescriptor
    order: int
    outer: str
    label: str
    number: bool
    has_presence: bool

    def read(self, message: Any) -> Any:
        """Its value in an input; None where it is not given."""
        name: str = self.descriptor.name
        if self.outer:
            if not message.HasField(self.outer):
                return None
            message = getattr(message, self.outer)
        if self.has_presence:
            return getattr(message, name) if message.HasField(name) else None
        return getattr(message, name) or None

    def shown(self, value: Any) -> str:
        """A value as callers write it: a number, or the short name of an enum value."""
        enum = self.descriptor.enum_type
        if enum is None:
            return _number(value)
        prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
        name: str = enum.values_by_number[value].name
        return name.removeprefix(prefix).lower()


@cache
def _parameters(of: Descriptor, outer: str = "") -> dict[str, _Parameter]:
    """The parameters of an input, by the names that the catalogue has for them."""
    found: dict[str, _Parameter] = {}
    for field in of.fields:
        if field.name in _CONTENT:
            continue
        number = field.cpp_type in _NUMBERS and not field.is_repeated
        label = f"{outer}.{field.name}" if outer else field.name
        found[field.name] = _Parameter(field, len(found), outer, label, number, field.has_presence)
        if field.message_type is not None:
            found |= _parameters(field.message_type, field.name)
    return found


_NUMBERS = frozenset(
    (
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_DOUBLE,
        FieldDescriptor.CPPTYPE_FLOAT,
    )
)


class Fitting:
    """An input on its way to a route.

    `input` is the caller's own message until the first change, which makes a copy: the caller's is never
    changed. Parameters are named as in the catalogue, those of voice_settings by their own names; a name that
    the input does not have is ignored.
    """

    __slots__ = ("_changes", "_given", "_known", "input", "route")

    def __init__(self, given: Any, route: Route) -> None:
        self.input = given
        self.route = route
        self._given = given
        self._known = _parameters(given.DESCRIPTOR)
        self._changes: dict[str, tuple[tuple[bool, int, str], Adjustment, str]] = {}

    def get(self, name: str) -> Any:
        """A parameter's value as it goes out; None where it was not given or was dropped."""
        parameter = self._known.get(name)
        return None if parameter is None else parameter.read(self.input)

    def drop(self, name: str, takes: str = _LEFT_OUT) -> None:
        """Leaves a parameter out, where it was given. `takes` completes "it must be …"."""
        if self.get(name) is None:
            return
        parameter = self._known[name]
        self._message(parameter).ClearField(name)
        if parameter.descriptor.message_type is not None:  # what was changed inside it is gone with it
            within = parameter.label + "."
            self._changes = {k: v for k, v in self._changes.items() if not k.startswith(within)}
        self._note(parameter, None, takes)

    def drop_items(self, name: str, unwanted: Callable[[Any], bool], takes: str) -> None:
        """Leaves out the items of a list that are `unwanted`."""
        items = self.get(name)
        if items is None or not any(map(unwanted, items)):
            return
        kept = [item for item in items if not unwanted(item)]
        if not kept:
            self.drop(name, takes)
            return
        parameter = self._known[name]
        for index, item in enumerate(items):
            if unwanted(item):
                self._note(parameter, None, takes, f"{parameter.label}[{index}]")
        message = self._message(parameter)
        message.ClearField(name)
        getattr(message, name).extend(kept)

    def replace(self, name: str, value: Any, takes: str) -> None:
        """Sends another value than the one that was given. A parameter that was not given is set, too, but
        that is no adjustment."""
        parameter = self._known.get(name)
        if parameter is not None and parameter.read(self.input) != value:
            setattr(self._message(parameter), name, value)
            self._note(parameter, value, takes)

    def override(self, names: dict[str, str], fixed: Any) -> None:
        """Adjusts to the operator's `fixed` fields of every request, which replace what the caller gave.
        `names` are the vendor's names of the parameters."""
        if not fixed:
            return
        for name, theirs in names.items():
            if theirs in fixed and self.get(name) is not None:
                value = fixed[theirs]
                if self._known[name].number and type(value) in (int, float):
                    self.replace(name, type(self.get(name))(value), _number(value))
                else:
                    self.drop(name)

    def clamp(self, name: str) -> None:
        """Brings a number into the route's range for it."""
        given = self.get(name)
        if given is not None and self._known[name].number:
            value = self.route.fit(name, given)
            if value != given:
                least, most, step = self.route.clamp[name]
                limits = f"from {_number(least)} to {_number(most)}"
                what = f"a multiple of {_number(step)}" if step else "a number"
                self.replace(name, value, f"{what} {limits}")

    @property
    def adjustments(self) -> list[Adjustment]:
        """What was changed of what the caller gave: dropped parameters first, in the contract's order."""
        return [adjustment for _, adjustment, _ in sorted(self._changes.values(), key=_place)]

    def refusal(self) -> PomeloError:
        """The error that names the first adjustment, and what the model takes."""
        _, adjustment, takes = min(self._changes.values(), key=_place)
        return invalid(adjustment.field, takes)

    def _message(self, parameter: _Parameter) -> Any:
        """The message that a parameter is in, which may be changed."""
        if self.input is self._given:
            self.input = type(self._given)()
            self.input.CopyFrom(self._given)
        return getattr(self.input, parameter.outer) if parameter.outer else self.input

    def _note(self, parameter: _Parameter, value: Any, takes: str, label: str = "") -> None:
        given = parameter.read(self._given)
        if given is None:
            return
        label = label or parameter.label
        if value == given:
            self._changes.pop(label, None)
            return
        if value is None:
            adjustment = Adjustment(field=label, kind=Adjustment.KIND_DROPPED)
        else:
            used = parameter.shown(value)
            adjustment = Adjustment(field=label, kind=Adjustment.KIND_CLAMPED, used=used)
        self._changes[label] = ((value is not None, parameter.order, label), adjustment, takes)


Hook = Callable[[Fitting], None]
"""A provider's method `fit_text`, `fit_image` and so on: changes what its API does not take of an input."""


def fit(
    given: Any, model: Model, route: Route, hook: Hook | None = None, most_tokens: int | None = None
) -> Fitting:
    """A valid input as `route` takes it. `most_tokens` are the tokens of output that are paid for, None where
    the model's own maximum is."""
    fitting = Fitting(given, route)
    _limit_tokens(fitting, model.limits.max_output_tokens, most_tokens)
    for name in route.drop:
        fitting.drop(name)
    for name in route.clamp:
        fitting.clamp(name)
    if most_tokens is not None and (fitting.get("max_tokens") or 0) > most_tokens:
        _limit_tokens(fitting, 0, most_tokens)  # a clamp may have raised it above what is paid for
    if hook is not None:
        hook(fitting)
    return fitting


def _limit_tokens(fitting: Fitting, limit: int, paid: int | None) -> None:
    given = fitting.get("max_tokens")
    most = min(limit, paid) if limit and paid is not None else limit or paid
    if most and (paid is not None if given is None else given > most):
        fitting.replace("max_tokens", most, f"a whole number from 1 to {_number(most)}")


def _place(change: tuple[tuple[bool, int, str], Adjustment, str]) -> tuple[bool, int, str]:
    return change[0]


def _number(value: float) -> str:
    return repr(int(value) if value == int(value) else value)
