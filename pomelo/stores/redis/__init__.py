"""The store on Redis or Valkey. `pomelo.stores.open_store` opens it; nothing else knows of Redis.

`store` is the port's face, `opening` reads its URL and looks at the server, `client` and `link` are the way
there, `scripts` and `lua/` what is done there; `keys`, `accounts`, `ledger` and `usage` are the roles;
`owners` ends the tasks of processes that died; `archive` has the usage records.
"""

from __future__ import annotations

from pomelo.stores.redis.connection import Timing
from pomelo.stores.redis.store import RedisStore, open_redis

__all__ = ["RedisStore", "Timing", "open_redis"]
