"""The sandbox's voice: a plucked tone for each word, a rest for each space.

`sound.py` encodes what `notes` gives. The tune follows the text, the timbre and the key follow `tone`
(voice, seed, model). Tones are put together from ready-made stretches of two periods at 64 loudnesses, so
that minutes of sound cost no arithmetic for each sample.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain, cycle

CHARACTER_SECONDS = 0.06
"""How long a character is spoken at speed 1."""

_LOUD = 63
_SCALE = (0, 2, 4, 7, 9, 12, 14, 16)
_ATTACK, _RELEASE, _FADE = 0.012, 0.03, 2.5
# A word longer than twelve letters is sung as several notes, which bounds the memory for one.
_TOKEN = re.compile(r"\S{1,12}|\s{1,12}")


def notes(
    text: str, tone: str, rate: int, samples: int, character: float, code: Callable[[Iterable[int]], bytes]
) -> Iterator[bytes]:
    """The melody of `text`, note by note, `samples` in all; over again when the text ends before.

    `rate` is in samples a second, `character` the seconds of one, `code` puts 16-bit samples into bytes.
    """
    voice = _Voice(tone, rate, code)
    tokens: list[str] = _TOKEN.findall(text) or [" "]
    characters = max(1, round(samples / (rate * character)))
    done = place = 0
    for token in cycle(tokens):
        place = min(place + len(token), characters)
        end = samples * place // characters
        yield voice.rest(end - done) if token.isspace() else voice.note(token, end - done)
        done = end
        if place == characters:
            return


def blocks(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in blocks of `size`; the last one is filled up with zeros."""
    rest = b""
    for piece in pieces:
        data = rest + piece
        whole = len(data) - len(data) % size
        for start in range(0, whole, size):
            yield data[start : start + size]
        rest = data[whole:]
    if rest:
        yield rest.ljust(size, b"\0")


class _Voice:
    """Sings at one sample rate in one coding."""

    def __init__(self, tone: str, rate: int, code: Callable[[Iterable[int]], bytes]) -> None:
        mark = zlib.crc32(tone.encode())
        self._mark = mark
        self._rate = rate
        self._code = code
        self._base = 150 * 2 ** (mark % 13 / 12)
        self._overtones = ((mark >> 8) % 50 / 100, (mark >> 16) % 30 / 100)
        self._stretches: dict[tuple[int, int], bytes] = {}
        self._waves: dict[int, list[float]] = {}

    @cached_property
    def _silence(self) -> bytes:
        return self._code([0])

    def rest(self, samples: int) -> bytes:
        """Silence."""
        return self._silence * samples

    def note(self, word: str, samples: int) -> bytes:
        """A tone that fades, for a word."""
        pitch = _SCALE[zlib.crc32(word.lower().encode(), self._mark) % len(_SCALE)]
        length = len(self._wave(pitch))
        step = length / self._rate
        stretches = samples // length
        tone = b"".join(
            chain(
                self._stretch(pitch, _loudness(index * step, (stretches - index) * step))
                for index in range(stretches)
            )
        )
        return tone + self.rest(samples - stretches * length)

    def _stretch(self, pitch: int, loudness: int) -> bytes:
        stretch = self._stretches.get((pitch, loudness))
        if stretch is None:
            stretch = self._code([int(value * loudness) for value in self._wave(pitch)])
            self._stretches[pitch, loudness] = stretch
        return stretch

    def _wave(self, pitch: int) -> list[float]:
        """Two periods, from zero to zero, so that stretches of other loudness join without a click."""
        wave = self._waves.get(pitch)
        if wave is None:
            length = max(4, round(2 * self._rate / (self._base * 2 ** (pitch / 12))))
            second, third = self._overtones
            turn = 4 * math.pi / length
            wave = [
                9000 / _LOUD * (math.sin(a) + second * math.sin(2 * a) + third * math.sin(3 * a))
                for a in (index * turn for index in range(length))
            ]
            self._waves[pitch] = wave
        return wave


def _loudness(since: float, left: float) -> int:
    """0 to 63, from the seconds since a note began and until it ends."""
    swell = min(1.0, (since + 0.004) / _ATTACK, left / _RELEASE)
    return int(_LOUD * swell * math.exp(-_FADE * since))
