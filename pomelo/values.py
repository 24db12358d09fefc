"""Immutable values that cost no more than mutable ones.

A frozen dataclass sets each field by `object.__setattr__`, which takes ten times as long as an assignment,
and a task makes about two hundred fields. So the values of a task are frozen for the type checker alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["value_type"]

if TYPE_CHECKING:
    from dataclasses import dataclass as value_type
else:
    from dataclasses import dataclass

    def value_type(*, frozen: bool, **options: Any) -> Any:
        """Decorates a class as `dataclass` does. With `frozen` its values can be hashed, and only the type
        checker refuses an assignment to a field."""
        return dataclass(unsafe_hash=frozen, **options)
