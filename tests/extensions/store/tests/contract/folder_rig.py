"""The rig of the added store for the contract tests."""

from __future__ import annotations

from pomelo.stores.folder import open_folder
from tests.contract.ledger_rig import SqliteRig


class FolderRig(SqliteRig):
    """A store in a folder."""

    async def open(self) -> None:
        opened = open_folder(
            f"folder://{self.path.parent}",
            "",
            now=lambda: self.clock.wall,
            monotonic=lambda: self.clock.steady,
        )
        self.store = await self._stack.enter_async_context(opened)
