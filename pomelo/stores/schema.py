"""The tables of the SQL store, as numbered steps from an empty file to today's.

A step that was released is never changed; a new one is added at the end. `pomelo.stores.sqlite` takes them,
all in one transaction.
"""

from __future__ import annotations

APPLICATION_ID = 0x504D4C4F
"""Marks a database file as ours."""

USAGE = (
    """
    CREATE TABLE usage (
        task_id TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL,
        account TEXT NOT NULL,
        live INTEGER NOT NULL,
        key_id TEXT NOT NULL,
        wire TEXT NOT NULL,
        model TEXT NOT NULL,
        task_type TEXT NOT NULL,
        provider TEXT NOT NULL,
        provider_model TEXT NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        images INTEGER NOT NULL,
        pixels INTEGER NOT NULL,
        audio_ms INTEGER NOT NULL,
        processing_ms INTEGER NOT NULL,
        first_byte_ms INTEGER NOT NULL,
        output_bytes INTEGER NOT NULL,
        cost INTEGER NOT NULL CHECK (cost >= 0),
        uncollected INTEGER NOT NULL CHECK (uncollected >= 0),
        prices TEXT NOT NULL,
        price_version TEXT NOT NULL,
        source TEXT NOT NULL,
        complete INTEGER NOT NULL CHECK (complete IN (0, 1)),
        at REAL NOT NULL,
        FOREIGN KEY (account, live) REFERENCES wallets (account, live)
    ) STRICT
    """,
    "CREATE INDEX usage_of_wallet ON usage (account, live, at)",
    "CREATE INDEX usage_by_time ON usage (at)",
)
"""The table of usage records, of which an archive has nothing but this and the columns below."""

USAGE_OF_NEW_PRICES = (
    "ALTER TABLE usage ADD COLUMN cached_input_tokens INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE usage ADD COLUMN cache_write_input_tokens INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE usage ADD COLUMN cache_write_1h_input_tokens INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE usage ADD COLUMN provider_micros INTEGER NOT NULL DEFAULT 0",
)
"""What prices of caches, and prices by the provider's report, are counted by."""

ARCHIVE_MIGRATIONS = (USAGE, USAGE_OF_NEW_PRICES)
"""Step n, counted from 0, makes version n of an archive: the first archives had no number."""

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
        # slots counts the wallet's rows of holds. A window is open from its start for WINDOW seconds.
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
        # One running task: what it took, in which windows, and its record so far, as JSON. A token_start
        # that is null: its tokens are in no window.
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
        *USAGE,
        # An Idempotency-Key: while its task runs there is no answer and no end.
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
    USAGE_OF_NEW_PRICES,
)
"""Step n, counted from 1, makes version n."""
