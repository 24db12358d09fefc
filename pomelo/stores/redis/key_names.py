"""The names of all keys. Those of a wallet share a hash tag, so that a cluster keeps them on one node."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

from pomelo.stores.ledger import Wallet

FORMAT = "pomelo:format"
"""The version of all that is kept."""

ACCOUNTS = "pomelo:{accounts}:created"
PLANS = "pomelo:{accounts}:plans"
ACCOUNT_ORDER = "pomelo:{accounts}:order"
"""The names of all accounts, sorted."""

KEYS = "pomelo:{keys}:records"
REVOKED = "pomelo:{keys}:revoked"
KEY_ORDER = "pomelo:{keys}:order"
"""The places of all keys (see `key_place`), sorted."""

OWNERS = "pomelo:owners"
"""Who may have holds, and how often each has beaten."""

WALLETS = "pomelo:wallets"
"""All wallets that may have something."""

GRANTED = "pomelo:granted"
"""Which wallet each grant is for."""


class Names(NamedTuple):
    """The keys of a wallet."""

    prefix: str
    wallet: str
    holds: str
    drafts: str
    grants: str
    usage: str

    def mark(self, task_id: str) -> str:
        """How a task ended, for a while."""
        return f"{self.prefix}mark:{task_id}"

    def answer(self, key: str) -> str:
        """What an Idempotency-Key stands for."""
        return f"{self.prefix}answer:{key}"


@lru_cache(10_000)
def names(wallet: Wallet) -> Names:
    """The keys of a wallet."""
    prefix = key(wallet, "")
    return Names(prefix, *[prefix + name for name in ("wallet", "holds", "drafts", "grants", "usage")])


def key(wallet: Wallet, table: str) -> str:
    """The key of one of a wallet's tables: wallet, holds, drafts, grants or usage."""
    # Quoted, so that the first closing brace is ours, whatever the account's name.
    return f"pomelo:{{{quote(wallet.account, safe='')}/{'live' if wallet.live else 'test'}}}:{table}"


def key_order(account: str) -> str:
    """The places of an account's keys, sorted."""
    return f"{KEY_ORDER}:{quote(account, safe='')}"


def key_place(created: float, key_id: str) -> str:
    """A text that sorts in the order of key lists: by time, then by id. Times begin in 1970."""
    return f"{struct.pack('>d', max(created, 0.0)).hex()}:{key_id}"


def member(wallet: Wallet) -> str:
    """The wallet as WALLETS has it."""
    return f"{'live' if wallet.live else 'test'}/{wallet.account}"


def wallet_of(text: bytes) -> Wallet:
    """The wallet that `member` wrote."""
    mode, _, account = text.decode().partition("/")
    return Wallet(account, mode == "live")
