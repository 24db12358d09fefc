"""Pictures of the sandbox: a landscape by a lake, drawn from a hash, as PNG, JPEG or WebP.

`provider.py` walks `draw` in a worker thread. Nothing here knows of tasks or events. A picture is painted
row by row in runs of one colour (a row is a few joined runs, never a million single pixels), so that a
megapixel costs milliseconds.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from hashlib import shake_256
from typing import TYPE_CHECKING, TypeAlias, cast

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_Colour: TypeAlias = tuple[float, float, float]
_ENCODERS = {
    "jpeg": ("mjpeg", "yuvj420p", {"qmin": "2", "qmax": "3"}),
    "webp": ("libwebp", "yuv420p", {"quality": "85", "compression_level": "2"}),
}
_DIM = bytes(int(value * 0.72) + 12 for value in range(256))
"""What becomes of a colour when the lake mirrors it."""


def draw(subject: str, width: int, height: int, file_format: str) -> Iterator[float | bytes]:
    """Draws what `subject` stands for; the same subject and size give the same file.

    Yields 0.25, 0.5 and 0.75 as rows are painted, then the file. `file_format` is a key of
    CONTENT_TYPES; sizes are in pixels, from 1.
    """
    rows: list[bytes] = []
    marks = {max(1, height * quarter // 4): quarter / 4 for quarter in (1, 2, 3)}
    for row in _Scene.of(subject, width, height).rows():
        rows.append(row)
        progress = marks.get(len(rows))
        if progress is not None:
            yield progress
    if file_format == "png":
        yield _png(rows, width, height)
    else:
        yield _encode(rows, width, height, file_format)


class _Dice:
    """Numbers from a hash, one after another."""

    def __init__(self, subject: str) -> None:
        self._bytes = iter(shake_256(subject.encode()).digest(512))

    def within(self, least: float, most: float) -> float:
        """A number from `least` to `most`."""
        return least + (most - least) * (next(self._bytes) * 256 + next(self._bytes)) / 65535


@dataclass(frozen=True, slots=True)
class _Mountain:
    """A peak and the slopes of its two sides, in pixels across for a pixel down; `rough` bends them."""

    x: float
    y: float
    left: float
    right: float
    rough: float
    phase: float

    def span(self, y: int, width: int) -> tuple[int, int]:
        """Where the mountain begins and ends in row `y`; empty when the second is not above the first."""
        down = y - self.y
        bend = self.rough * math.sin(down * 0.13 + self.phase) * math.sin(down * 0.041 + self.phase * 2)
        return (
            min(max(int(self.x - down * self.left + bend), 0), width),
            min(max(int(self.x + down * self.right + bend), 0), width),
        )


@dataclass(frozen=True, slots=True)
class _Scene:
    """All that is to be painted. `shore` is the row where the lake begins; ranges come from far to near."""

    width: int
    height: int
    shore: int
    sky: tuple[_Colour, _Colour]
    sun: tuple[float, float, float]
    light: _Colour
    haze: _Colour
    ranges: tuple[tuple[_Colour, tuple[_Mountain, ...]], ...]
    ripple: float

    @classmethod
    def of(cls, subject: str, width: int, height: int) -> _Scene:
        """The scene that a subject stands for."""
        dice = _Dice(subject)
        hue = dice.within(0, 1)
        turn = dice.within(0.05, 0.22) * (1 if dice.within(0, 1) > 0.5 else -1)
        bright = dice.within(0.55, 0.95)
        haze = _colour(hue + turn, dice.within(0.25, 0.5), min(1, bright + 0.15))
        shore = max(1, int(height * dice.within(0.6, 0.78)))
        side = min(width, height)
        ranges = []
        count = 4
        for index in range(count):
            near = (index + 1) / count
            colour = _colour(hue + turn * (1 - near) * 0.5, 0.35 + 0.3 * near, bright * (0.85 - 0.62 * near))
            mountains = []
            for _ in range(3):
                top = shore * (0.42 + 0.4 * near + dice.within(-0.18, 0.12))
                mountains.append(
                    _Mountain(
                        x=dice.within(-0.05, 1.05) * width,
                        y=top,
                        left=dice.within(0.7, 2.2) * (0.7 + near),
                        right=dice.within(0.7, 2.2) * (0.7 + near),
                        rough=side * 0.012,
                        phase=dice.within(0, 6.28),
                    )
                )
            ranges.append((colour, tuple(mountains)))
        return cls(
            width=width,
            height=height,
            shore=shore,
            sky=(_colour(hue, dice.within(0.45, 0.75), bright * 0.8), haze),
            sun=(
                dice.within(0.15, 0.85) * width,
                dice.within(0.15, 0.6) * shore,
                dice.within(0.04, 0.11) * side,
            ),
            light=_colour(hue + turn * 1.5, dice.within(0.08, 0.35), 1),
            haze=haze,
            ranges=tuple(ranges),
            ripple=side * dice.within(0.004, 0.012),
        )

    def rows(self) -> Iterator[bytes]:
        """The rows from the top, 3 bytes a pixel."""
        land = []
        for y in range(self.shore):
            land.append(self._land(y))
            yield land[-1]
        deep = self.height - self.shore
        for below in range(deep):
            mirrored = land[max(0, self.shore - 1 - below * self.shore // max(deep, self.shore))]
            swing = self.ripple * (0.3 + below / deep) * math.sin(below * below / deep * 0.25 + below * 0.7)
            shift = min(int(abs(swing)), self.width) * 3
            if swing > 0:
                shifted = mirrored[shift:] + mirrored[-3:] * (shift // 3)
            else:
                shifted = mirrored[:3] * (shift // 3) + mirrored[: len(mirrored) - shift]
            yield shifted.translate(_DIM)

    def _land(self, y: int) -> bytes:
        width = self.width
        sky = _mix(self.sky[0], self.sky[1], y / self.shore)
        row = bytearray(_pixel(sky) * width)
        sun_x, sun_y, radius = self.sun
        for size, strength in ((3.2, 0.12), (2.2, 0.16), (1.5, 0.22), (1.0, 1.0)):
            reach = (radius * size) ** 2 - (y - sun_y) ** 2
            if reach > 0:
                half = math.sqrt(reach)
                sky = _mix(sky, self.light, strength)
                _run(row, max(int(sun_x - half), 0), min(int(sun_x + half) + 1, width), sky)
        for colour, mountains in self.ranges:
            fog = None
            for mountain in mountains:
                if y >= mountain.y:
                    if fog is None:
                        fog = _mix(colour, self.haze, 0.45 * (y / self.shore) ** 3)
                    _run(row, *mountain.span(y, width), fog)
        return bytes(row)


def _run(row: bytearray, start: int, end: int, colour: _Colour) -> None:
    if end > start:
        row[start * 3 : end * 3] = _pixel(colour) * (end - start)


def _pixel(colour: _Colour) -> bytes:
    return bytes((int(colour[0]), int(colour[1]), int(colour[2])))


def _mix(one: _Colour, other: _Colour, share: float) -> _Colour:
    rest = 1 - share
    return (
        one[0] * rest + other[0] * share,
        one[1] * rest + other[1] * share,
        one[2] * rest + other[2] * share,
    )


def _colour(hue: float, saturation: float, value: float) -> _Colour:
    """From hue, saturation and value, 0 to 1 each; the hue wraps."""

    def channel(offset: float) -> float:
        place = (offset + hue * 6) % 6
        return 255 * value * (1 - saturation * max(0.0, min(place, 4 - place, 1.0)))

    return channel(5), channel(3), channel(1)


def _png(rows: list[bytes], width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"\0" + b"\0".join(rows)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            chunk(b"IDAT", zlib.compress(pixels, 1)),
            chunk(b"IEND", b""),
        )
    )


def _encode(rows: list[bytes], width: int, height: int, file_format: str) -> bytes:
    # The import costs a tenth of a second and 30 MB: a server that makes no pictures does without.
    import av

    name, pixels, options = _ENCODERS[file_format]
    frame = av.VideoFrame(width, height, "rgb24")
    plane = frame.planes[0]
    padding = bytes(plane.line_size - width * 3)
    plane.update(padding.join(rows) + padding)
    frame = frame.reformat(format=pixels)
    frame.pts = 0
    codec = cast("VideoCodecContext", av.CodecContext.create(name, "w"))
    codec.width, codec.height, codec.pix_fmt = width, height, pixels
    codec.framerate = Fraction(1)
    codec.thread_count = 1
    codec.options = options
    return b"".join(bytes(packet) for packet in (*codec.encode(frame), *codec.encode(None)))
