"""The Lua scripts, complete: those of a wallet start with the functions of wallet.lua."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "lua"


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the digest by which the server knows it."""

    text: str
    digest: str
    timed: bool
    """Whether its last argument is the time: empty, or set by a test."""


def _script(*names: str) -> Script:
    text = "\n".join((_FOLDER / f"{name}.lua").read_text(encoding="utf-8") for name in names)
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(text, digest, "wallet" in names)


RESERVE = _script("wallet", "reserve")
SETTLE = _script("wallet", "settle")
VOID = _script("wallet", "void")
NOTE = _script("wallet", "note")
RECOVER = _script("wallet", "recover")
LIMIT_STATUS = _script("wallet", "limit_status")
GRANT = _script("wallet", "act", "grant")
SET_CREDIT_LIMIT = _script("wallet", "act", "set_credit_limit")
WALLET_STATES = _script("wallet", "wallet_states")
BALANCES = _script("balances")
NON_EMPTY = _script("non_empty")
ADD_KEY = _script("act", "new_key", "add_key")
REVOKE_KEY = _script("act", "revoke_key")
REPLACE_KEY = _script("act", "new_key", "replace_key")
REHASH_KEY = _script("rehash_key")
SET_BUDGET = _script("act", "set_budget")
READ_FIELDS = _script("read_fields")
ADD_ACCOUNT = _script("act", "add_account")
SET_PLAN = _script("act", "set_plan")
SET_DISABLED = _script("act", "set_disabled")
HEARTBEAT = _script("heartbeat")
MARK_DEAD = _script("mark_dead")
CLOCK = _script("clock")
NOTE_STATE = _script("note_state")
