"""A transaction of a connection that is in autocommit mode."""

from __future__ import annotations

import sqlite3
from types import TracebackType


class Transaction:
    """A context manager that commits what is written in the block, or rolls all of it back if the block or
    the commit fails. Every task ends in one, so it is not a generator."""

    __slots__ = ("_connection",)

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connection = self._connection
        try:
            if error is None:
                connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
