"""The store on Redis or Valkey.

`store` implements the roles and opens the store, `url` parses its URL and checks the server, `connection` and
`client` send commands, `scripts` and `lua/` are what runs on the server. `keys`, `accounts`, `ledger` and
`usage` are the roles. `workers` recovers the tasks of dead processes, `wallet_index` lists the wallets.
"""

from __future__ import annotations

from pomelo.stores.redis.connection import Timing
from pomelo.stores.redis.processes import read_fleet
from pomelo.stores.redis.store import RedisStore, check_url, open_redis

__all__ = ["RedisStore", "Timing", "check_url", "open_redis", "read_fleet"]
