"""Finds the id of a voice by its name: in the operator's table, the account's list, and the default
voices."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from datetime import date
from itertools import islice

from pomelo.catalog.voice_names import is_id, is_name, normalize
from pomelo.errors import invalid
from pomelo.protobuf.times import today_utc
from pomelo.providers.base import CALLER, VENDOR_CALL, log_fields
from pomelo.providers.errors import UpstreamError

log = logging.getLogger("pomelo.providers")

MAX_AGE = 300.0
"""Seconds after which the account's list is read again."""

REFRESH_AFTER = 15.0
"""Seconds after which a name that is not in the list causes it to be read again: the voice may be new."""

MAX_NAMES = 20_000
"""Names that are stored; an account has a few hundred voices."""

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
    # Legacy voices: no longer listed, but still served by id.
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

OPENAI_VOICES = {
    "alloy": "river",
    "ash": "will",
    "ballad": "george",
    "cedar": "roger",
    "coral": "laura",
    "echo": "eric",
    "fable": "daniel",
    "marin": "aria",
    "nova": "jessica",
    "onyx": "brian",
    "sage": "alice",
    "shimmer": "sarah",
    "verse": "liam",
}
"""The default voices that stand in for OpenAI's, so that clients of its API can be used unchanged."""

LAST_DAY = date(2026, 12, 31)
"""The last day of the vendor's default voices. Accounts created since March 2026 don't have
them."""

NAMES_SHOWN = 10

VoiceList = Callable[[], Awaitable[Iterable[tuple[str, str]]]]
"""Reads the account's list: (name, id) in the vendor's order. It raises only UpstreamError."""


class Voices:
    """Finds the ids of voices. A text that it does not know never becomes an id, and so a part of a URL.

    A name is looked up in the operator's table, then in the account's list, then until LAST_DAY among the
    vendor's default voices, which have OpenAI's names, too. Concurrent calls share one read of the list.
    `now` is monotonic, `today` returns the date in UTC.
    """

    def __init__(
        self,
        read_list: VoiceList,
        *,
        now: Callable[[], float] = time.monotonic,
        today: Callable[[], date] = today_utc,
    ) -> None:
        self._read_list = read_list
        self._now = now
        self._today = today
        self._names: dict[str, str] = {}
        self._read_at: float | None = None
        self._lock = asyncio.Lock()
        self._reads = 0
        self._failure: UpstreamError | None = None
        self._retry_at = 0.0
        """After a failure, when the list is read again for a name that has a fallback."""

    async def find(
        self, voice: str, table: Mapping[str, str] | None = None, gone: Collection[str] = ()
    ) -> str:
        """Return the id of a voice from its id or its name, in any case; the name's first word is enough.

        `table` is the operator's, with names as `voice_names.normalize` returns them. `gone` are ids that the
        vendor has just refused: the next id of the same name is returned, if there is one.

        Raises:
            PomeloError: invalid_parameter; no voice of that name or id is left.
            UpstreamError: the list can't be read, and there is no fallback.
        """
        table = table or {}
        name = normalize(voice)
        configured = table.get(name)
        if configured is not None and configured not in gone:
            return configured
        is_voice_id = _ID.fullmatch(voice) is not None
        if is_voice_id and voice not in gone:
            return voice
        default = DEFAULTS.get(OPENAI_VOICES.get(name, name)) if self._today() <= LAST_DAY else None
        if default in gone:
            default = None
        age = float("inf") if self._read_at is None else self._now() - self._read_at
        listed = self._names.get(name)
        unknown = (listed is None or listed in gone) and default is None
        if age >= MAX_AGE or (unknown and age >= REFRESH_AFTER):
            # For an id, the list is only needed to name voices that work.
            await self._refresh(has_fallback=bool(listed or default or is_voice_id))
        for voice_id in (self._names.get(name), default):
            if voice_id is not None and voice_id not in gone:
                return voice_id
        log.warning(
            "no voice of a requested name or id is left. Set it in [voices] of POMELO_CATALOG",
            extra=log_fields(),
        )
        examples = self._examples(table, gone)
        raise invalid("voice", f"the name of a voice of the provider{examples} or a voice's id")

    def _examples(self, table: Mapping[str, str], gone: Collection[str]) -> str:
        """Some names that work; those with a comma would be unclear in a list."""
        known = {**self._names, **table}
        names = (name for name in (*table, *self._names) if is_name(name) and "," not in name)
        shown = dict.fromkeys(name for name in names if known[name] not in gone)
        return f", such as {', '.join(islice(shown, NAMES_SHOWN))}," if shown else ""

    async def _refresh(self, *, has_fallback: bool) -> None:
        """Read the list again. A failure is ignored if there is a fallback, such as an old list."""
        if has_fallback and self._now() < self._retry_at:
            return
        try:
            await self._read()
        except UpstreamError:
            if not has_fallback:
                raise

    async def _read(self) -> None:
        """Read the list, or share the outcome of a read that ended while this call waited for the lock."""
        reads = self._reads
        if (call := VENDOR_CALL.get()) is not None and self._lock.locked():
            call.waits = call.sent is None
        async with self._lock:
            if self._reads == reads:
                failure = None
                caller = CALLER.get()
                CALLER.set("")  # the read serves all waiting calls, so it counts for no account
                try:
                    self._names = _index(await self._read_list())
                    self._read_at = self._now()
                except UpstreamError as error:
                    failure = error
                    self._retry_at = self._now() + REFRESH_AFTER
                finally:
                    CALLER.set(caller)
                self._failure = failure
                self._reads += 1
            failure = self._failure
        if failure is not None:
            raise failure.copy()  # one exception can't be raised in several tasks


def _index(voices: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Ids by full names and by first words. A full name comes before a first word, an earlier voice before a
    later one."""
    full: dict[str, str] = {}
    first: dict[str, str] = {}
    for display_name, voice_id in voices:
        name = normalize(display_name)
        if not name or not is_id(voice_id):
            continue
        full.setdefault(name, voice_id)
        first.setdefault(name.split()[0].rstrip(",;:"), voice_id)
        if len(full) + len(first) >= MAX_NAMES:
            break
    return first | full
