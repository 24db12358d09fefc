"""Bringing a caller's parameter into what a route's model takes.

Providers call it for each parameter of the contract that they pass on; the catalogue's rows decide.
"""

from pomelo.catalog import Number, Route


def fitted(route: Route, name: str, value: Number) -> Number | None:
    """See Route.fit."""
    return route.fit(name, value)
