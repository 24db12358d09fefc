"""The operator's log.

The script of a change writes its act beside what it changes: in a cluster, it can write nowhere else. A list
first moves these acts to the log, in which each has one place, whoever moves it and how often.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic_core import from_json, to_json

from pomelo.stores.accounts import Wallet
from pomelo.stores.acts import Act
from pomelo.stores.redis.connection import REPORT_TIMEOUT, Argument, scan, translated_errors
from pomelo.stores.redis.key_names import ACCOUNT_ACTS, KEY_ACTS, act_log, key_position, names
from pomelo.stores.redis.wallet_index import Role, for_each


class Acts(Role):
    """Implements ActStore."""

    @translated_errors
    async def list_acts(
        self,
        account: str | None = None,
        *,
        since: float | None = None,
        limit: int,
        after: tuple[float, str] | None = None,
    ) -> list[Act]:
        if after is None:
            await self._move(account)
        first = "-" if since is None else f"[{key_position(since, '')}"
        last = "+" if after is None else f"({key_position(*after)}"
        with self._connection.one_deadline(REPORT_TIMEOUT):
            found = await self._connection.send(
                "ZREVRANGEBYLEX", act_log(account), last, first, "LIMIT", 0, limit
            )
        return [_decode(text.partition(b" ")[2]) for text in found]

    async def _move(self, account: str | None) -> None:
        """Moves the acts of an account, or of all, to the log."""
        if account is None:
            wallets = await self._wallet_index.with_data("acts")
        else:
            wallets = [Wallet(account, live) for live in (False, True)]
        sources = [ACCOUNT_ACTS, KEY_ACTS, *(names(wallet).acts for wallet in wallets)]
        await for_each(sources, self._move_from)

    async def _move_from(self, source: str) -> None:
        async for page in scan(self._connection, "HSCAN", source):
            entries: dict[str, list[Argument]] = {}
            for text in page.values():
                act = _decode_changed(text)
                entry = f"{key_position(act.at, act.act_id)} ".encode() + to_json(act)
                for log in (act_log(act.account), act_log(None)):
                    entries.setdefault(log, []).extend((0, entry))
            with self._connection.one_deadline(REPORT_TIMEOUT):
                await for_each(entries.items(), lambda each: self._connection.send("ZADD", each[0], *each[1]))
                await self._connection.send("HDEL", source, *page)


def act_args(act: Act | None) -> list[Argument]:
    """The id of an act and the act, as the arguments of a script; empty without one."""
    return ["", ""] if act is None else [act.act_id, to_json(act)]


def _decode_changed(text: bytes) -> Act:
    """An act as its script wrote it, with the values that the script found."""
    encoded, old, new = from_json(text)
    act = _decode(encoded)
    return replace(act, old=act.old if old is False else old, new=act.new if new is False else new)


def _decode(text: bytes | str) -> Act:
    return Act(**from_json(text))
