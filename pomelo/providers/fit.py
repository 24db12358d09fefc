"""Bringing a caller's parameter into what a route's model takes.

Providers call it for each parameter of the contract that they pass on; the catalogue's rows decide.
"""

from typing import TypeVar

from pomelo.catalog import Route

Number = TypeVar("Number", int, float)


def fitted(route: Route, name: str, value: Number) -> Number | None:
    """`value` as the route's model takes it: in its range and on its grid; None where it takes no `name`.

    A whole number stays one.
    """
    if name in route.drop:
        return None
    clamp = route.clamp.get(name)
    if clamp is None:
        return value
    least, most, step = clamp
    kind = type(value)
    if step:
        value = kind(round(value / step) * step)
    return kind(min(max(value, least), most))
