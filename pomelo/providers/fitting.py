"""Fits an input to a route, and lists the adjustments.

This is the only place that changes an input: `fit` applies the route's row of the catalogue (`drop`, `clamp`,
the model's maximum of tokens) and then the provider's own hook. Providers send the result unchanged, so what
is reported to the caller can't differ from what the vendor gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any, Generic, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from pomelo.catalog.catalog import Model, Route
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.task_pb2 import Adjustment, TaskSpec
from pomelo.protobuf.enums import enum_names
from pomelo.values import value_type

_CONTENT = frozenset(("messages", "prompt", "text", "voice", "audio"))
"""Fields that are not parameters of a model: never dropped or clamped."""

_OBJECTS = frozenset(("voice_settings",))
"""Fields whose own fields are parameters, too."""

_LABELS = {"format": "response_format"}
"""The names of parameters for callers, if they are not those of the contract in protobuf."""

_ONLY_WITH_TOOLS = ("tool_choice", "parallel_tool_calls")

_PENALTIES = ("presence_penalty", "frequency_penalty")
"""Parameters that have no effect if they are 0, as many clients send them."""

_NOT_SUPPORTED = "left out: the model does not take it"

InputT = TypeVar("InputT")


@value_type(frozen=True, slots=True)
class Given(Generic[InputT]):
    """What a caller gave: the input message of the task type, and the id of the end user, or ""."""

    input: InputT
    user: str = ""


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A field that may be adjusted: of the input, of its field `outer`, or (`is_user`) the end user's id."""

    descriptor: FieldDescriptor
    order: int
    outer: str
    label: str
    number: bool
    has_presence: bool
    is_user: bool = False

    def read(self, given: Given[Any] | Fitting) -> Any:
        """Its value; None if it is not set."""
        if self.is_user:
            return given.user or None
        name: str = self.descriptor.name
        message = given.input
        if self.outer:
            if not message.HasField(self.outer):
                return None
            message = getattr(message, self.outer)
        if self.has_presence:
            return getattr(message, name) if message.HasField(name) else None
        return getattr(message, name) or None

    def format(self, value: Any) -> str:
        """Format a value as callers write it: a number, or the short name of an enum value."""
        enum = self.descriptor.enum_type
        return _format_number(value) if enum is None else enum_names(enum)[value]


@cache
def _parameters(message_type: Descriptor, outer: str = "") -> dict[str, _Parameter]:
    """The parameters of an input, by their names in the catalogue."""
    parameters: dict[str, _Parameter] = {}
    for field in message_type.fields:
        if field.name in _CONTENT:
            continue
        number = field.cpp_type in _NUMBERS and not field.is_repeated
        label = f"{outer}.{field.name}" if outer else _LABELS.get(field.name, field.name)
        order = len(parameters)
        parameters[field.name] = _Parameter(field, order, outer, label, number, field.has_presence)
        if field.name in _OBJECTS and field.message_type is not None:
            parameters |= _parameters(field.message_type, field.name)
    if not outer:
        user = TaskSpec.DESCRIPTOR.fields_by_name["user"]
        parameters["user"] = _Parameter(user, len(parameters), "", "user", False, False, is_user=True)
    return parameters


_NUMBERS = frozenset(
    (
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_DOUBLE,
        FieldDescriptor.CPPTYPE_FLOAT,
    )
)


class Fitting:
    """An input while it is fitted to a route.

    `input` is the caller's own message until the first change, which makes a copy; `user` is the end user's
    id, or "". Parameters have their names in the catalogue: those of the fields of the input, also of its
    voice_settings. A name that the input does not have is ignored. The argument `expected` completes the
    sentence "it must be …".
    """

    __slots__ = ("_changes", "_given", "_parameters", "input", "present", "route", "user")

    def __init__(self, given: Given[Any], route: Route) -> None:
        self.input = given.input
        self.user = given.user
        self.route = route
        self._given = given
        self._parameters = parameters = _parameters(given.input.DESCRIPTOR)
        self.present = present = {"user"} if given.user else set()
        """Names of all parameters that may be set; the others are skipped."""
        for field, value in given.input.ListFields():
            if field.name in parameters:
                present.add(field.name)
                if field.name in _OBJECTS:
                    present.update(inner.name for inner, _ in value.ListFields())
        self._changes: dict[str, tuple[tuple[bool, int, str], Adjustment, str]] = {}

    def get(self, name: str) -> Any:
        """Return a parameter's current value; None if it was not set, or was dropped."""
        return self._parameters[name].read(self) if name in self.present else None

    def drop(self, name: str, expected: str = _NOT_SUPPORTED) -> None:
        """Leave a parameter out, if it is set; with the tools, what needs them."""
        if self.get(name) is None:
            return
        parameter = self._parameters[name]
        if parameter.is_user:
            self.user = ""
        else:
            self._message(parameter).ClearField(name)
        if parameter.descriptor.message_type is not None:  # changes inside it no longer count
            prefix = parameter.label + "."
            self._changes = {k: v for k, v in self._changes.items() if not k.startswith(prefix)}
        self._record(parameter, None, expected)
        if name == "tools":
            for each in _ONLY_WITH_TOOLS:
                self.drop(each, expected)

    def drop_items(self, name: str, unwanted: Callable[[Any], bool], expected: str) -> None:
        """Leave out the items of a list that are `unwanted`."""
        items = self.get(name)
        if items is None or not any(map(unwanted, items)):
            return
        kept = [item for item in items if not unwanted(item)]
        if not kept:
            self.drop(name, expected)
            return
        parameter = self._parameters[name]
        for index, item in enumerate(items):
            if unwanted(item):
                self._record(parameter, None, expected, f"{parameter.label}[{index}]")
        message = self._message(parameter)
        message.ClearField(name)
        getattr(message, name).extend(kept)

    def replace(self, name: str, value: Any, expected: str) -> None:
        """Set a parameter to another value. If the caller did not set it, that is not an adjustment."""
        parameter = self._parameters.get(name)
        if parameter is not None and parameter.read(self) != value:
            setattr(self._message(parameter), name, value)
            self.present.add(name)
            self._record(parameter, value, expected)

    def override(self, names: dict[str, str], fixed: Any) -> None:
        """Apply the operator's `fixed` fields of every request, which replace the caller's values, except for
        max_tokens, which bounds what the task costs. `names` are the vendor's names of the parameters."""
        if not fixed:
            return
        for name, vendor_name in names.items():
            if vendor_name in fixed and name != "max_tokens" and self.get(name) is not None:
                value = fixed[vendor_name]
                if self._parameters[name].number and type(value) in (int, float):
                    self.replace(name, type(self.get(name))(value), _format_number(value))
                else:
                    self.drop(name)

    def clamp(self, name: str) -> None:
        """Bring a number into the route's range for it."""
        current = self.get(name)
        if current is not None and self._parameters[name].number:
            value = self.route.fit(name, current)
            if value != current:
                minimum, maximum, step = self.route.clamp[name]
                limits = f"from {_bound(minimum)} to {_bound(maximum)}"
                what = f"a multiple of {_bound(step)}" if step else "a number"
                self.replace(name, value, f"{what} {limits}")

    def clamp_effort(self) -> None:
        """Replace the reasoning effort by the nearest one of the route's; the lower of two."""
        effort, efforts = self.get("reasoning_effort"), self.route.efforts
        if effort is not None and efforts and effort not in efforts:
            nearest = min(efforts, key=lambda each: (abs(each - effort), each))
            listed = ", ".join(map(self._parameters["reasoning_effort"].format, efforts))
            self.replace("reasoning_effort", nearest, f"one of {listed}" if len(efforts) > 1 else listed)

    @property
    def adjustments(self) -> list[Adjustment]:
        """The changes of what the caller set: dropped parameters first, in the contract's order."""
        if not self._changes:
            return []
        return [adjustment for _, adjustment, _ in sorted(self._changes.values(), key=itemgetter(0))]

    def refusal(self) -> PomeloError:
        """Return the error that names the first adjustment, and what the model accepts."""
        _, adjustment, expected = min(self._changes.values(), key=itemgetter(0))
        return invalid(adjustment.field, expected)

    def _message(self, parameter: _Parameter) -> Any:
        """What contains a parameter: this, or a message in the copy of the input that may be changed."""
        if parameter.is_user:
            return self
        original = self._given.input
        if self.input is original:
            self.input = type(original)()
            self.input.CopyFrom(original)
        return getattr(self.input, parameter.outer) if parameter.outer else self.input

    def _record(self, parameter: _Parameter, value: Any, expected: str, label: str = "") -> None:
        original = parameter.read(self._given)
        if original is None:
            return
        label = label or parameter.label
        if value == original or (value is None and not original and parameter.descriptor.name in _PENALTIES):
            self._changes.pop(label, None)
            return
        if value is None:
            adjustment = Adjustment(field=label, kind=Adjustment.KIND_DROPPED)
        else:
            used = parameter.format(value)
            adjustment = Adjustment(field=label, kind=Adjustment.KIND_CLAMPED, used=used)
        self._changes[label] = ((value is not None, parameter.order, label), adjustment, expected)


Hook = Callable[[Fitting], None]
"""A provider's method `fit_text`, `fit_image` and so on: changes what its API does not take of an input."""


def fit(
    given: Given[Any], model: Model, route: Route, hook: Hook | None = None, max_tokens: int | None = None
) -> Fitting:
    """Fit a valid input to `route`. `max_tokens` are the tokens of output that are reserved; None: the
    model's own maximum."""
    fitting = Fitting(given, route)
    present = fitting.present
    if max_tokens is not None or "max_tokens" in present:
        _limit_tokens(fitting, model.limits.max_output_tokens, max_tokens)
    for name in route.drop:
        if name in present:
            fitting.drop(name)
    for name in route.clamp:
        if name in present:
            fitting.clamp(name)
    if "reasoning_effort" in present:
        fitting.clamp_effort()
    if max_tokens is not None and (fitting.get("max_tokens") or 0) > max_tokens:
        _limit_tokens(fitting, 0, max_tokens)  # a clamp may have raised it above what is reserved
    if hook is not None:
        hook(fitting)
    return fitting


def _limit_tokens(fitting: Fitting, limit: int, reserved: int | None) -> None:
    current = fitting.get("max_tokens")
    maximum = min(limit, reserved) if limit and reserved is not None else limit or reserved
    if maximum and (reserved is not None if current is None else current > maximum):
        fitting.replace("max_tokens", maximum, f"a whole number from 1 to {_bound(maximum)}")


def _plain(value: float) -> float:
    """Return an integer for a whole number, so that it is written without a fraction."""
    return int(value) if value == int(value) else value


def _format_number(value: float) -> str:
    return repr(_plain(value))


def _bound(value: float) -> str:
    """Format a number for the message of an error, as all messages do."""
    return f"{_plain(value):,}"
