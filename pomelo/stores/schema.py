"""The tables of the SQLite store and of the archives, as numbered migrations from an empty database.

A released migration never changes: tests/contract/test_migrations.py pins the released ones by their hash. A
new one is added at the end. A new column of usage records is a field of UsageRecord with the next version,
and one `_add_usage_columns` in each list of migrations.
"""

from __future__ import annotations

from dataclasses import fields

from pomelo.stores.usage import UsageRecord

APPLICATION_ID = 0x504D4C4F
"""Identifies a SQLite file as a Pomelo database."""

USAGE_VERSION = max(column.metadata.get("version", 1) for column in fields(UsageRecord))
"""The current version of the usage table."""

_TYPES = {"str": "TEXT", "int": "INTEGER", "bool": "INTEGER", "float": "REAL"}
_CONSTRAINTS = {
    "task_id": "UNIQUE",
    "cost": "CHECK (cost >= 0)",
    "uncollected": "CHECK (uncollected >= 0)",
    "complete": "CHECK (complete IN (0, 1))",
}


def usage_columns(version: int, types: dict[str, str], constraints: dict[str, str]) -> list[str]:
    """The SQL definitions of the columns that `version` of the usage table added, from the fields of
    UsageRecord. `types` are by the fields' types, `constraints` by the columns' names."""
    definitions = []
    for column in fields(UsageRecord):
        if column.metadata.get("version", 1) == version:
            default = f" DEFAULT {column.default!r}" if version > 1 else ""
            constraint = constraints.get(column.name, "")
            # `user` is a word of SQL. The statements of the released versions have no quotes.
            name = f'"{column.name}"' if version > 2 else column.name
            definition = f"{name} {types[str(column.type)]} NOT NULL{default} {constraint}"
            definitions.append(definition.rstrip())
    return definitions


def _add_usage_columns(version: int) -> tuple[str, ...]:
    return tuple(f"ALTER TABLE usage ADD COLUMN {each}" for each in usage_columns(version, _TYPES, {}))


_USAGE = (
    f"""
    CREATE TABLE usage (
        {", ".join(usage_columns(1, _TYPES, _CONSTRAINTS))},
        FOREIGN KEY (account, live) REFERENCES wallets (account, live)
    ) STRICT
    """,
    "CREATE INDEX usage_of_wallet ON usage (account, live, at)",
    "CREATE INDEX usage_by_time ON usage (at)",
)

ARCHIVE_MIGRATIONS = (_USAGE, _add_usage_columns(2), _add_usage_columns(3), _add_usage_columns(4))
"""The tables of a SQLite archive: only usage records. Step n, counted from 0, leads to version n."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE accounts (name TEXT NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID",
        "INSERT INTO accounts (name) VALUES ('default')",
        """
        CREATE TABLE keys (
            key_id TEXT NOT NULL PRIMARY KEY,
            account TEXT NOT NULL REFERENCES accounts (name),
            live INTEGER NOT NULL CHECK (live IN (0, 1)),
            digest BLOB NOT NULL,
            models TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL,
            revoked REAL
        ) STRICT, WITHOUT ROWID
        """,
    ),
    (
        "ALTER TABLE accounts ADD COLUMN plan TEXT NOT NULL DEFAULT 'pro'",
        "ALTER TABLE accounts ADD COLUMN created REAL NOT NULL DEFAULT 0.0",
        "UPDATE accounts SET created = CAST(strftime('%s', 'now') AS REAL)",
        # slots is the number of the wallet's rows in holds. A window is open for WINDOW seconds from its
        # start.
        """
        CREATE TABLE wallets (
            account TEXT NOT NULL REFERENCES accounts (name),
            live INTEGER NOT NULL CHECK (live IN (0, 1)),
            granted INTEGER NOT NULL DEFAULT 0,
            spent INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
            held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0),
            slots INTEGER NOT NULL DEFAULT 0 CHECK (slots >= 0),
            window_start REAL NOT NULL DEFAULT 0.0,
            window_requests INTEGER NOT NULL DEFAULT 0 CHECK (window_requests >= 0),
            PRIMARY KEY (account, live),
            CHECK (granted >= spent + held)
        ) STRICT, WITHOUT ROWID
        """,
        """
        CREATE TABLE grants (
            grant_id TEXT NOT NULL UNIQUE,
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            amount INTEGER NOT NULL CHECK (amount > 0),
            at REAL NOT NULL,
            note TEXT NOT NULL,
            FOREIGN KEY (account, live) REFERENCES wallets (account, live)
        ) STRICT
        """,
        "CREATE INDEX grants_of_wallet ON grants (account, live, at)",
        """
        CREATE TABLE token_windows (
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            model TEXT NOT NULL,
            start REAL NOT NULL,
            tokens INTEGER NOT NULL CHECK (tokens >= 0),
            PRIMARY KEY (account, live, model),
            FOREIGN KEY (account, live) REFERENCES wallets (account, live)
        ) STRICT, WITHOUT ROWID
        """,
        # The reservation of a running task: amounts, windows, and its record so far as JSON. If token_start
        # is null, its tokens are counted in no window.
        """
        CREATE TABLE holds (
            task_id TEXT NOT NULL PRIMARY KEY,
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            amount INTEGER NOT NULL CHECK (amount >= 0),
            window_start REAL NOT NULL,
            model TEXT NOT NULL,
            token_start REAL,
            tokens INTEGER NOT NULL CHECK (tokens >= 0),
            repeat_key TEXT,
            record BLOB NOT NULL,
            FOREIGN KEY (account, live) REFERENCES wallets (account, live)
        ) STRICT, WITHOUT ROWID
        """,
        *_USAGE,
        # An Idempotency-Key. While its task runs, answer and expires are null.
        """
        CREATE TABLE repeats (
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            key TEXT NOT NULL,
            fingerprint BLOB NOT NULL,
            state TEXT NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'done')),
            task_id TEXT NOT NULL,
            answer BLOB,
            expires REAL,
            UNIQUE (account, live, key),
            CHECK ((state = 'done') = (answer IS NOT NULL AND expires IS NOT NULL))
        ) STRICT
        """,
        "CREATE INDEX repeats_by_end ON repeats (expires) WHERE expires IS NOT NULL",
        "INSERT INTO wallets (account, live, granted) VALUES ('default', 0, 100000000)",
        """
        INSERT INTO grants (grant_id, account, live, amount, at, note)
        SELECT 'test credits of default', name, 0, 100000000, created, 'to begin with'
        FROM accounts WHERE name = 'default'
        """,
    ),
    (
        "CREATE INDEX keys_by_time ON keys (created, key_id)",
        "CREATE INDEX keys_of_account ON keys (account, created, key_id)",
    ),
    _add_usage_columns(2),
    # wallets.counters are by name [count, start of the window, its end], or [count, null, null] without a
    # window. holds.counted is what a reservation counts, by name [amount, start of the window or null]. Times
    # keep all their digits.
    (
        "ALTER TABLE wallets ADD COLUMN counters TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE holds ADD COLUMN counted TEXT NOT NULL DEFAULT '{}'",
        """
        UPDATE wallets SET counters = (
            SELECT json_group_object(name, json(count)) FROM (
                SELECT 'requests' AS name,
                    printf('[%d,%!.17g,%!.17g]', window_requests, window_start, window_start + 60.0) AS count
                WHERE window_start > 0.0
                UNION ALL SELECT 'concurrency', printf('[%d,null,null]', slots) WHERE slots > 0
                UNION ALL SELECT 'tokens:' || model, printf('[%d,%!.17g,%!.17g]', tokens, start, start + 60.0)
                FROM token_windows AS t WHERE t.account = wallets.account AND t.live = wallets.live
            )
        )
        """,
        """
        UPDATE holds SET counted = (
            SELECT json_group_object(name, json(count)) FROM (
                SELECT 'requests' AS name, printf('[1,%!.17g]', window_start) AS count
                UNION ALL SELECT 'concurrency', '[1,null]'
                UNION ALL SELECT 'tokens:' || model, printf('[%d,%!.17g]', tokens, token_start)
                WHERE token_start IS NOT NULL
            )
        )
        """,
        "DROP TABLE token_windows",
        *(f"ALTER TABLE wallets DROP COLUMN {name}" for name in ("slots", "window_start", "window_requests")),
        *(
            f"ALTER TABLE holds DROP COLUMN {name}"
            for name in ("window_start", "model", "token_start", "tokens")
        ),
    ),
    _add_usage_columns(3),
    _add_usage_columns(4),
    # The secret that a key's digest was made with, noted while the root secret is rotated.
    ("ALTER TABLE keys ADD COLUMN secret_id TEXT NOT NULL DEFAULT ''",),
    # The amount of a grant may be negative. wallets.granted includes the credit limit, so that
    # granted - spent - held stays what is available. keys.budget counts in budgets under the id keys.origin.
    (
        "ALTER TABLE grants RENAME TO old_grants",
        """
        CREATE TABLE grants (
            grant_id TEXT NOT NULL UNIQUE,
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            amount INTEGER NOT NULL CHECK (amount <> 0),
            at REAL NOT NULL,
            note TEXT NOT NULL,
            FOREIGN KEY (account, live) REFERENCES wallets (account, live)
        ) STRICT
        """,
        "INSERT INTO grants SELECT * FROM old_grants ORDER BY rowid",
        "DROP TABLE old_grants",
        "CREATE INDEX grants_of_wallet ON grants (account, live, at)",
        "ALTER TABLE wallets ADD COLUMN credit_limit INTEGER NOT NULL DEFAULT 0 CHECK (credit_limit >= 0)",
        "ALTER TABLE accounts ADD COLUMN disabled REAL",
        *(
            f"ALTER TABLE keys ADD COLUMN {name} TEXT NOT NULL DEFAULT ''"
            for name in ("name", "budget", "origin", "successor")
        ),
        "ALTER TABLE keys ADD COLUMN used REAL",
        # What tasks that have ended cost of a budget, in the period that began at start.
        """
        CREATE TABLE budgets (
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            name TEXT NOT NULL,
            start REAL NOT NULL,
            spent INTEGER NOT NULL CHECK (spent >= 0),
            PRIMARY KEY (account, live, name),
            FOREIGN KEY (account, live) REFERENCES wallets (account, live)
        ) STRICT, WITHOUT ROWID
        """,
        """
        CREATE TABLE acts (
            act_id TEXT NOT NULL PRIMARY KEY,
            at REAL NOT NULL,
            action TEXT NOT NULL,
            account TEXT NOT NULL,
            key_id TEXT NOT NULL,
            live INTEGER,
            old TEXT NOT NULL,
            new TEXT NOT NULL,
            note TEXT NOT NULL
        ) STRICT, WITHOUT ROWID
        """,
        "CREATE INDEX acts_by_time ON acts (at, act_id)",
        "CREATE INDEX acts_of_account ON acts (account, at, act_id)",
    ),
)
"""The tables of the store. Step n, counted from 1, leads to version n."""
