"""The ids of the tool calls in a conversation, as a vendor takes them."""

from __future__ import annotations

import re
from hashlib import sha256


class CallIds:
    """Replaces ids that do not match `valid`, and those that an earlier call has: callers' ids may be another
    vendor's, and are unique only within a message. The same conversation always gets the same ids."""

    __slots__ = ("_latest", "_used", "_valid")

    def __init__(self, valid: re.Pattern[str]) -> None:
        self._valid = valid
        self._used: set[str] = set()
        self._latest: dict[str, str] = {}

    def of_call(self, call_id: str) -> str:
        """Return the id to send for the next call."""
        sent = call_id
        if call_id in self._used or not self._valid.fullmatch(call_id):
            # Mistral takes only ids of this length.
            sent = sha256(f"{len(self._used)} {call_id}".encode()).hexdigest()[:9]
        self._used.add(sent)
        self._latest[call_id] = sent
        return sent

    def of_result(self, call_id: str) -> str:
        """Return the id of the latest call with this id, for its result."""
        return self._latest.get(call_id, call_id)
