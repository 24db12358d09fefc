"""The fixtures of all contract tests."""

from __future__ import annotations

from tests.contract.archive_rig import archive, postgres, url
from tests.contract.ledger_rig import clock, rig
from tests.contract.redis_rig import opened, server, started_server

__all__ = ["archive", "clock", "opened", "postgres", "rig", "server", "started_server", "url"]
