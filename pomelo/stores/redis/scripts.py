"""The Lua scripts, whole: those of wallets begin with what they share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "lua"


@dataclass(frozen=True, slots=True)
class Script:
    """One script and the digest that the server knows it by."""

    text: str
    digest: str
    timed: bool
    """It is one of a wallet, and takes the time of a test as its last argument."""


def _script(*names: str) -> Script:
    text = "\n".join((_FOLDER / f"{name}.lua").read_text(encoding="utf-8") for name in names)
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(text, digest, "wallet" in names)


TAKE = _script("wallet", "take")
SETTLE = _script("wallet", "settle")
VOID = _script("wallet", "void")
NOTE = _script("wallet", "note")
RECOVER = _script("wallet", "recover")
STANDING = _script("wallet", "standing")
HOLDING = _script("wallet", "holding")
GRANT = _script("wallet", "grant")
STATES = _script("wallet", "states")
BALANCES = _script("balances")
FILLED = _script("filled")
ADD_KEY = _script("add_key")
REVOKE_KEY = _script("revoke_key")
REPLACE_KEY = _script("replace_key")
ADD_ACCOUNT = _script("add_account")
SET_PLAN = _script("set_plan")
BEAT = _script("beat")
BURY = _script("bury")
