"""Forms with a sound in them, as ElevenLabs takes them; `elevenlabs` calls `form`.

A sound is read from its file while it is sent, and never held whole. No name that a caller or the media store
gave to it leaves the house.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import aiohttp
from aiohttp.abc import AbstractStreamWriter

from pomelo.errors import PomeloError
from pomelo.media.audio import Swapper, little_endian
from pomelo.providers.base import AudioSource

_ENDINGS = {
    "audio/mpeg": "mp3",
    "audio/wav": "wav",
    "audio/ogg": "ogg",
    "audio/flac": "flac",
    "audio/mp4": "m4a",
    "audio/webm": "webm",
    "video/mp4": "mp4",
    "video/webm": "webm",
}
_TYPE = re.compile(r"[a-z]+/[a-z0-9.+-]+(;[a-z]+=[a-z0-9.+-]+)?")
_ANY = "application/octet-stream"
_PIECE = 64 * 1024
"""Bytes of a file that are in memory at a time; a hundred uploads at once are nothing unusual."""

_RAW = "audio/pcm;rate=16000"
"""The one kind of bare samples that the vendor takes, when told so."""


@contextmanager
def form(name: str, audio: AudioSource, fields: Mapping[str, str]) -> Iterator[aiohttp.MultipartWriter]:
    """A form of `fields` and, as its last part `name`, the sound. Its file is open until it is left.

    Raises:
        PomeloError: invalid_parameter, the sound is no longer kept.
    """
    with _opened(audio) as file:
        writer = aiohttp.MultipartWriter("form-data")
        given = audio.content_type.replace(" ", "").lower()
        kind = little_endian(given)
        more = {"file_format": "pcm_s16le_16"} if kind == _RAW else {}
        for field, value in {**fields, **more}.items():
            writer.append(value).set_content_disposition("form-data", name=field)
        kind = kind if _TYPE.fullmatch(kind) else _ANY
        part = writer.append_payload(_File(file, kind, Swapper(given)))
        ending = _ENDINGS.get(kind.partition(";")[0], "bin")
        part.set_content_disposition("form-data", name=name, filename=f"audio.{ending}")
        yield writer


def _opened(audio: AudioSource) -> BinaryIO:
    if audio.path is None:
        return io.BytesIO(audio.data)
    try:
        return audio.path.open("rb", buffering=0)
    except OSError:
        pass
    # Outside of the except block: the system's error has the path.
    raise PomeloError("invalid_parameter", "The audio is no longer kept. Upload it again", field="audio")


class _File(aiohttp.Payload):
    """A file as a part of a form, its bytes swapped by `swapper`; unlike aiohttp's own it is read in small
    pieces."""

    _value: BinaryIO

    def __init__(self, file: BinaryIO, content_type: str, swapper: Swapper) -> None:
        super().__init__(file, content_type=content_type)
        self._swapper = swapper
        self._size = swapper.size(file.seek(0, os.SEEK_END))
        file.seek(0)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Nobody needs a sound as text."""
        raise NotImplementedError

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Sends the file.

        Raises:
            OSError: it can't be read, or is shorter than it was.
        """
        loop = asyncio.get_running_loop()
        left = self._size or 0
        while left:
            piece = await loop.run_in_executor(None, self._value.read, min(left, _PIECE))
            if not piece:
                raise OSError("a file became shorter")
            left -= len(piece)
            await writer.write(self._swapper.swap(piece))
