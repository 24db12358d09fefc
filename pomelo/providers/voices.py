"""Voices by name: a table of the vendor's default ones, and the account's own list, kept for a while.

`elevenlabs` asks for an id and gives the way to read the account's list. Nothing here knows a wire.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable

from pomelo.errors import PomeloError, invalid
from pomelo.providers.base import CALLER

FRESH = 300.0
"""Seconds for which the account's list is believed."""

ASKED_AGAIN = 15.0
"""Seconds after which a name that is not in the list makes it be read again: it may be a new voice."""

NAMES_MOST = 20_000
"""Names that are kept; an account has a few hundred voices."""

_ID = re.compile(r"[A-Za-z0-9]{20}")
_SAFE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

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

Listed = Callable[[], Awaitable[Iterable[tuple[str, str]]]]
"""Reads the account's list: (name, id) in the vendor's order. It raises PomeloError alone."""


class Voices:
    """The ids of voices by their names. An id, a default name or a name that is kept is found at once;
    only another one waits for the list, which is read once for all that wait for it."""

    def __init__(self, listed: Listed, *, now: Callable[[], float] = time.monotonic) -> None:
        self._listed = listed
        self._now = now
        self._names: dict[str, str] = {}
        self._read_at: float | None = None
        self._reading = asyncio.Lock()
        self._attempts = 0
        self._failure: PomeloError | None = None
        self._spared_until = 0.0
        """Until when an old list is believed, because it could not be read again."""

    async def find(self, voice: str) -> str:
        """The id of a voice by its name or its id, in any case; a name's first word is enough.

        Raises:
            PomeloError: invalid_parameter, there is none; what reading the list raises.
        """
        if _ID.fullmatch(voice):
            return voice
        name = _plain(voice)
        found = DEFAULTS.get(name)
        if found is None and (self._age() < FRESH or self._now() < self._spared_until):
            found = self._names.get(name)
        if found is not None:
            return found
        if self._age() >= ASKED_AGAIN:
            try:
                await self._read()
            except PomeloError:
                # An old list is better than none: a voice keeps its id.
                if name not in self._names:
                    raise
        found = self._names.get(name)
        if found is None:
            raise invalid("voice", "the name of a voice of the provider, such as adam, or a voice's id")
        return found

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
                CALLER.set("")  # for all that wait, whatever the share of the one who asks
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
            copy = PomeloError(failure.code, failure.message, field=failure.field, retry_after=failure.wait)
            copy.replay = failure.replay
            raise copy


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _index(voices: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Ids by whole names and by first words; a whole name counts more, and so does an earlier voice."""
    whole: dict[str, str] = {}
    first: dict[str, str] = {}
    for shown, voice_id in voices:
        name = _plain(shown)
        if not name or not _SAFE_ID.fullmatch(voice_id):
            continue
        whole.setdefault(name, voice_id)
        first.setdefault(name.split()[0].rstrip(",;:"), voice_id)
        if len(whole) + len(first) >= NAMES_MOST:
            break
    return first | whole
