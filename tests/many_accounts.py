"""Fills stores with many accounts and keys in bulk; through the store API it would take minutes."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from pydantic_core import to_json
from redis import Redis

CREDITS = 5_000_000
"""Microcredits of each mode of an account."""


def fill_sqlite(path: Path, count: int, records: int = 0) -> None:
    """Adds accounts acct-0000000 and so on to a file that is not open. Each has a grant per mode,
    a key, and `records` usage records of tasks that cost 3 microcredits."""
    with closing(sqlite3.connect(path)) as file, file:
        numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ? - 1)"
        name = "printf('acct-%07d', i)"
        file.execute(
            f"{numbers} INSERT INTO accounts (name, plan, created) SELECT {name}, 'free', 1000.0 + i FROM n",
            (count,),
        )
        for live in (0, 1):
            file.execute(
                f"{numbers} INSERT INTO wallets (account, live, granted) SELECT {name}, {live}, {CREDITS} FROM n",
                (count,),
            )
            file.execute(
                f"{numbers} INSERT INTO grants (grant_id, account, live, amount, at, note)"
                f" SELECT 'g{live}:' || {name}, {name}, {live}, {CREDITS}, 1000.0 + i, '' FROM n",
                (count,),
            )
        file.execute(
            f"{numbers} INSERT INTO keys (key_id, account, live, digest, models, created)"
            f" SELECT printf('key%09d', i), {name}, 0, x'00', '[]', 1000.0 + i FROM n",
            (count,),
        )
        for number in range(records):
            file.execute(
                f"{numbers} INSERT INTO usage SELECT 'task{number}-' || i, 'req_x', {name}, 0,"
                " printf('key%09d', i), 'rest', 'gpt-4', 'text', 'sandbox', 'gpt-4', 1, 1, 0, 0, 0, 0, 5, 5, 9, 3,"
                " 0, 'million_input_tokens=3000000', '2026-11-22', 'provider', 1, 1.7e9 + i, 0, 0, 0, 0, 0, '', '', '' FROM n",
                (count,),
            )
            file.execute("UPDATE wallets SET spent = spent + 3 WHERE live = 0 AND account LIKE 'acct-%'")


def fill_redis(url: str, count: int) -> None:
    """Adds the same to a Redis server that no Pomelo process uses."""
    with closing(Redis.from_url(url)) as server:
        for start in range(0, count, 2_000):
            pipeline = server.pipeline(transaction=False)
            for i in range(start, min(start + 2_000, count)):
                name, at = f"acct-{i:07d}", 1000.0 + i
                pipeline.hset("pomelo:{accounts}:created", name, f"{at!r} x")
                pipeline.hset("pomelo:{accounts}:plans", name, "free")
                for live in ("test", "live"):
                    given = to_json({"amount": CREDITS, "at": at, "note": ""}).decode()
                    pipeline.sadd("pomelo:wallets", f"{live}/{name}")
                    pipeline.hset(f"pomelo:{{{name}/{live}}}:wallet", "granted", CREDITS)
                    pipeline.hset(f"pomelo:{{{name}/{live}}}:grants", f"g{live}:{name}", f"0 {given}")
                key = {"key_id": f"key{i:09d}", "account": name, "live": False, "models": [],
                       "created": at, "expires": None, "digest": "00"}  # fmt: skip
                pipeline.hset("pomelo:{keys}:records", f"key{i:09d}", to_json(key))
            pipeline.execute()
