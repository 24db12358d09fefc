"""Voices by name: the operator's table, the account's own list, and the vendor's default voices.

`elevenlabs` asks for an id and gives the way to read the account's list. Nothing here knows a wire.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from datetime import date
from itertools import islice

from pomelo.catalog.voice_names import is_id, is_name, normalize
from pomelo.errors import PomeloError, invalid
from pomelo.providers.base import CALLER
from pomelo.times import today_utc

log = logging.getLogger("pomelo.providers")

FRESH = 300.0
"""Seconds for which the account's list is believed."""

ASKED_AGAIN = 15.0
"""Seconds after which a name that is not in the list makes it be read again: it may be a new voice."""

NAMES_MOST = 20_000
"""Names that are kept; an account has a few hundred voices."""

_ID = re.compile(r"[A-Za-z0-9]{20}")

DEFAULTS = {
    "adam": "pNInz6obpgDQGcFmaJgB",
    "alice": "Xb7hH8MSUJpSbSDYk0k2",
    "aria": "9BWtsMINqrJLrRacOk9x",
    "bella": "hpp4J3VqNfWAUOO0d1Us",
    "bill": "pqHfZKP75CvOlQylNhV4",
    "brian": "nPczCjzI2devNBz1zQrb",
    "callum": "N2lVS1w4EtoT3dr4eOWO",
    "charlie": "IKne3meq5aSn9XLyUdCD",
    "charlotte": "XB0fDUnXU5powFXDhCwa",
    "chris": "iP95p4xoKVk53GoZ742B",
    "daniel": "onwK4e9ZLuTAKqWW03F9",
    "eric": "cjVigY5qzO86Huf0OWal",
    "george": "JBFqnCBsd6RMkjVDRZzb",
    "harry": "SOYHLrjzK2X1ezoPC6cr",
    "jessica": "cgSgspJ2msm6clMCkdW9",
    "laura": "FGY2WhTYpPnrIDTdsKH5",
    "liam": "TX3LPaxmHKxFdv7VOQHJ",
    "lily": "pFZP5JQG7iQjIQuC4Bku",
    "matilda": "XrExE9yKIg1WjnnlVkGX",
    "river": "SAz9YHcvj6GT2YYXdXww",
    "roger": "CwhRBWXzGAHq8TQ4Fs17",
    "sarah": "EXAVITQu4vr4xnSDxMaL",
    "will": "bIHbv24MWmeRgasZH58o",
    # Of old: no longer listed, and still served by id.
    "antoni": "ErXwobaYiN019PkySvjV",
    "arnold": "VR6AewLTigWG4xSOukaG",
    "clyde": "2EiwWnXFnvU5JabPnv8n",
    "dave": "CYw3kZ02Hs0563khs1Fj",
    "domi": "AZnzlk1XvdvUeBnXmlld",
    "emily": "LcfcDJNUP1GQjkzn1xUU",
    "ethan": "g5CIjZEefAph4nQFvHAz",
    "josh": "TxGEqnHWrfWFTfGW9XjX",
    "nicole": "piTKgcLEGmPE4e6mEKli",
    "rachel": "21m00Tcm4TlvDq8ikWAM",
    "sam": "yoZ06aMxZJJ28mfd3POQ",
}
"""The vendor's default voices, by their names in lower case."""

LAST_DAY = date(2026, 12, 31)
"""The last day of the vendor's default voices. Accounts created since March 2026 don't have
them."""

NAMES_SHOWN = 10

Listed = Callable[[], Awaitable[Iterable[tuple[str, str]]]]
"""Reads the account's list: (name, id) in the vendor's order. It raises PomeloError alone."""


class Voices:
    """The ids of voices by their names. No other text becomes an id, and so a part of a URL.

    A name is looked up in the operator's table, then in the account's list, then among the vendor's default
    voices until LAST_DAY. The list is read once for all calls that wait for it. `now` is monotonic,
    `today` returns the date in UTC.
    """

    def __init__(
        self,
        listed: Listed,
        *,
        now: Callable[[], float] = time.monotonic,
        today: Callable[[], date] = today_utc,
    ) -> None:
        self._listed = listed
        self._now = now
        self._today = today
        self._names: dict[str, str] = {}
        self._read_at: float | None = None
        self._reading = asyncio.Lock()
        self._attempts = 0
        self._failure: PomeloError | None = None
        self._spared_until = 0.0
        """After a failure, when the list is read again for a name that has a fallback."""

    async def find(
        self, voice: str, table: Mapping[str, str] | None = None, gone: Collection[str] = ()
    ) -> str:
        """The id of a voice by its name, in any case, or its id; a name's first word is enough.

        `table` is the operator's, with names from `voice_names.normalize`. `gone` are ids that the vendor
        has just refused: the next id of the same name is returned, if there is one.

        Raises:
            PomeloError: invalid_parameter, no voice of that name or id is left; what reading the list raises.
        """
        table = table or {}
        name = normalize(voice)
        chosen = table.get(name)
        if chosen is not None and chosen not in gone:
            return chosen
        by_id = _ID.fullmatch(voice) is not None
        if by_id and voice not in gone:
            return voice
        default = DEFAULTS.get(name) if self._today() <= LAST_DAY else None
        if default in gone:
            default = None
        age = self._age()
        known = self._names.get(name)
        if age >= FRESH or ((known is None or known in gone) and default is None and age >= ASKED_AGAIN):
            # Of an id the list can only tell which names would work instead.
            await self._refresh(known or default or (voice if by_id else None))
        for found in (self._names.get(name), default):
            if found is not None and found not in gone:
                return found
        log.warning("no voice of a requested name or id is left. Set it in [voices] of POMELO_CATALOG")
        examples = self._examples(table, gone)
        raise invalid("voice", f"the name of a voice of the provider{examples} or a voice's id")

    def _examples(self, table: Mapping[str, str], gone: Collection[str]) -> str:
        """Some names that work; those with a comma would be unclear in a list."""
        known = {**self._names, **table}
        names = (name for name in (*table, *self._names) if is_name(name) and "," not in name)
        shown = dict.fromkeys(name for name in names if known[name] not in gone)
        return f", such as {', '.join(islice(shown, NAMES_SHOWN))}," if shown else ""

    async def _refresh(self, otherwise: str | None) -> None:
        """Reads the list again. Where it can't be read, an old list or a default voice is better than none.

        Raises:
            PomeloError: it can't be read, and there is no `otherwise`.
        """
        if otherwise is not None and self._now() < self._spared_until:
            return
        try:
            await self._read()
        except PomeloError:
            if otherwise is None:
                raise

    def _age(self) -> float:
        if self._read_at is None:
            return float("inf")
        return self._now() - self._read_at

    async def _read(self) -> None:
        """Reads the list, unless somebody has tried to while this call waited; then it has their outcome."""
        attempts = self._attempts
        async with self._reading:
            if self._attempts == attempts:
                failure = None
                caller = CALLER.get()
                CALLER.set("")  # the read serves all waiting calls: no account's share
                try:
                    self._names = _index(await self._listed())
                    self._read_at = self._now()
                except PomeloError as error:
                    failure = error
                    self._spared_until = self._now() + ASKED_AGAIN
                finally:
                    CALLER.set(caller)
                self._failure = failure
                self._attempts += 1
            failure = self._failure
        if failure is not None:
            # A copy: one exception can't be raised in several tasks.
            copy = type(failure)(failure.code, failure.message, field=failure.field, retry_after=failure.wait)
            copy.replay = failure.replay
            raise copy


def _index(voices: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Ids by whole names and by first words; a whole name counts more, and so does an earlier voice."""
    whole: dict[str, str] = {}
    first: dict[str, str] = {}
    for shown, voice_id in voices:
        name = normalize(shown)
        if not name or not is_id(voice_id):
            continue
        whole.setdefault(name, voice_id)
        first.setdefault(name.split()[0].rstrip(",;:"), voice_id)
        if len(whole) + len(first) >= NAMES_MOST:
            break
    return first | whole
