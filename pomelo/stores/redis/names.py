"""The names of all keys. Those of a wallet share a hash tag, so that a cluster keeps them on one node."""

from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

from pomelo.stores.ledger import Wallet

FORMAT = "pomelo:format"
"""The version of all that is kept."""

ACCOUNTS = "pomelo:{accounts}:created"
PLANS = "pomelo:{accounts}:plans"
KEYS = "pomelo:{keys}:records"
REVOKED = "pomelo:{keys}:revoked"
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
    # Quoted, so that the first closing brace is ours, whatever the account's name.
    prefix = f"pomelo:{{{quote(wallet.account, safe='')}/{'live' if wallet.live else 'test'}}}:"
    return Names(prefix, *[prefix + name for name in ("wallet", "holds", "drafts", "grants", "usage")])


def member(wallet: Wallet) -> str:
    """The wallet as WALLETS has it."""
    return f"{'live' if wallet.live else 'test'}/{wallet.account}"


def wallet_of(text: bytes) -> Wallet:
    """The wallet that `member` wrote."""
    mode, _, account = text.decode().partition("/")
    return Wallet(account, mode == "live")
