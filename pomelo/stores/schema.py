"""The tables of the SQL store, as numbered steps from an empty file to today's.

A step that was released is never changed; a new one is added at the end. `pomelo.stores.sqlite` takes them,
each in one transaction.
"""

APPLICATION_ID = 0x504D4C4F
"""Marks a database file as ours."""

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
)
"""Step n, counted from 1, makes version n."""
