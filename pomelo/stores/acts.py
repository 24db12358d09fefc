"""The log of the operator's acts: what was changed, when, and from which value to which.

A method that changes something writes its act in the same step; a call that changes nothing writes no act.
An act is never changed or deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Act:
    """A change that the operator made at `at`, of an account or of its key `key_id`, in one mode or in both
    (None). `old` and `new` are the values as text, amounts in microcredits; never a key."""

    act_id: str
    at: float
    action: str
    account: str
    key_id: str = ""
    live: bool | None = None
    old: str = ""
    new: str = ""
    note: str = ""


class ActStore(Protocol):
    """Lists acts. Raises PomeloError store_unavailable if the store can't be reached."""

    async def list_acts(
        self,
        account: str | None = None,
        *,
        since: float | None = None,
        limit: int,
        after: tuple[float, str] | None = None,
    ) -> list[Act]:
        """Up to `limit` acts of one account, or of all, from the time `since` on, newest first. The list
        starts after the act with the time and id `after`."""
        ...
