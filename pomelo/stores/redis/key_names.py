"""The names of all keys. The keys of a wallet share a hash tag, so that a cluster stores them on one node."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

from pomelo.stores.accounts import Wallet

FORMAT = "pomelo:format"
"""The version of the stored data."""

ACCOUNTS = "pomelo:{accounts}:created"
PLANS = "pomelo:{accounts}:plans"
ACCOUNT_ORDER = "pomelo:{accounts}:order"
"""The names of all accounts, sorted."""

DISABLED = "pomelo:{accounts}:disabled"
"""The accounts that are disabled, and since when."""

KEYS = "pomelo:{keys}:records"
REVOKED = "pomelo:{keys}:revoked"
KEY_SECRETS = "pomelo:{keys}:secrets"
"""The secret that the digest of a key was made with, noted while the root secret is rotated."""
KEY_NAMES = "pomelo:{keys}:names"
"""Of keys that have them: the name, the id under which the budget is counted, and the successor."""

BUDGETS = "pomelo:{keys}:budgets"
USED = "pomelo:{keys}:used"
"""About when each key was used last."""

KEY_ORDER = "pomelo:{keys}:order"
"""The positions of all API keys (see `key_position`), sorted."""

WORKERS = "pomelo:owners"
"""The processes that may have reservations, each with the count of its heartbeats."""

PROCESSES = "pomelo:processes"
"""What the serving processes are configured with, by worker."""

WALLETS = "pomelo:wallets"
"""All wallets that may have data."""

GRANTED = "pomelo:granted"
"""The wallet of each grant, by grant id."""


ACCOUNT_ACTS = "pomelo:{accounts}:acts"
KEY_ACTS = "pomelo:{keys}:acts"
"""Acts of the operator that are not yet in the log; those that concern a wallet are beside it."""

ACT_LOG = "pomelo:{acts}:log"
"""The operator's log, sorted."""


class Names(NamedTuple):
    """The keys of a wallet."""

    prefix: str
    wallet: str
    holds: str
    drafts: str
    grants: str
    usage: str
    acts: str

    def tombstone(self, task_id: str) -> str:
        """How a task ended; it expires."""
        return f"{self.prefix}mark:{task_id}"

    def answer(self, key: str) -> str:
        """The task and the answer of an Idempotency-Key."""
        return f"{self.prefix}answer:{key}"

    def of_task(self, task_id: str, key: str) -> list[str]:
        """The keys that the scripts of a task start with: wallet, reservations, drafts, tombstone and answer.
        `key` is '=' and the Idempotency-Key, or empty: then the tombstone is in place of the answer."""
        tombstone = self.tombstone(task_id)
        return [self.wallet, self.holds, self.drafts, tombstone, self.answer(key[1:]) if key else tombstone]


@lru_cache(10_000)
def names(wallet: Wallet) -> Names:
    """The keys of a wallet."""
    prefix = key(wallet, "")
    return Names(
        prefix, *[prefix + name for name in ("wallet", "holds", "drafts", "grants", "usage", "acts")]
    )


def key(wallet: Wallet, table: str) -> str:
    """The key of a table of a wallet: wallet, holds (its reservations), drafts, grants, usage or acts."""
    # Quoted, so that the first closing brace ends the hash tag, whatever the account's name is.
    return f"pomelo:{{{quote(wallet.account, safe='')}/{'live' if wallet.live else 'test'}}}:{table}"


def key_order(account: str) -> str:
    """The key with the positions of an account's API keys, sorted."""
    return f"{KEY_ORDER}:{quote(account, safe='')}"


def act_log(account: str | None) -> str:
    """The key with the operator's log, of one account or of all."""
    return ACT_LOG if account is None else f"{ACT_LOG}:{quote(account, safe='')}"


def key_position(created: float, key_id: str) -> str:
    """A text that sorts like lists of API keys and of acts: by time, then by id. The time must not be before
    1970."""
    return f"{struct.pack('>d', max(created, 0.0)).hex()}:{key_id}"


def reported(subject: str) -> str:
    """The key with the state of a subject that was last reported to the operator, and by which call; it
    expires."""
    return f"pomelo:reported:{subject}"


def search_turn(purpose: str) -> str:
    """The key that a process sets before it searches all wallets for a purpose. It expires when the next
    search is due."""
    return f"pomelo:search:{purpose}"


def member(wallet: Wallet) -> str:
    """The wallet as a member of WALLETS."""
    return f"{'live' if wallet.live else 'test'}/{wallet.account}"


def budget_start(name: str) -> str:
    """The field of a wallet with the start of a budget's period: `window_fields` of wallet.lua."""
    word, _, scope = name.partition(":")
    return f"{word}_at:{scope}"


def wallet_of(text: bytes) -> Wallet:
    """Reverses `member`."""
    mode, _, account = text.decode().partition("/")
    return Wallet(account, mode == "live")
