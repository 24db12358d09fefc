"""Multipart forms with audio, as ElevenLabs takes them.

Audio is read from its file while it is sent, and never held in memory whole. The vendor gets no file name of
a caller or of the media store.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import aiohttp
from aiohttp.abc import AbstractStreamWriter

from pomelo.errors import PomeloError
from pomelo.media.audio import Swapper, little_endian, sample_format, wav_header
from pomelo.providers.base import AudioSource

_EXTENSIONS = {
    "audio/mpeg": "mp3",
    "audio/wav": "wav",
    "audio/ogg": "ogg",
    "audio/flac": "flac",
    "audio/mp4": "m4a",
    "audio/webm": "webm",
    "audio/aac": "aac",
    "audio/aiff": "aiff",
    "video/mpeg": "mpg",
    "video/x-flv": "flv",
    "video/x-ms-wmv": "wmv",
    "video/x-msvideo": "avi",
}
_MEDIA_TYPE = re.compile(r"[a-z]+/[a-z0-9.+-]+(;[a-z]+=[a-z0-9.+-]+)?")
_CHUNK_BYTES = 64 * 1024
"""Bytes of a file that are in memory at a time, because there may be hundreds of concurrent uploads."""

_RAW = "audio/pcm;rate=16000"
"""The only raw samples that the vendor takes, with a field that says so. Others are sent as a WAV file."""


@contextmanager
def form(name: str, audio: AudioSource, fields: Mapping[str, str]) -> Iterator[aiohttp.MultipartWriter]:
    """Make a form of `fields` with the audio as its last part, `name`. The audio's file is open until the
    context is left.

    Raises:
        PomeloError: invalid_parameter; the audio is no longer stored.
    """
    with _open(audio) as file:
        writer = aiohttp.MultipartWriter("form-data")
        source_type = audio.content_type.replace(" ", "").lower()
        content_type = little_endian(source_type)
        raw = {"file_format": "pcm_s16le_16"} if content_type == _RAW else {}
        for field, value in {**fields, **raw}.items():
            writer.append(value).set_content_disposition("form-data", name=field)
        wav = not raw and sample_format(source_type) is not None
        if wav:
            content_type = "audio/wav"
        content_type = content_type if _MEDIA_TYPE.fullmatch(content_type) else "application/octet-stream"
        part = writer.append_payload(_File(file, content_type, source_type, wav=wav))
        extension = _EXTENSIONS.get(content_type.partition(";")[0], "bin")
        part.set_content_disposition("form-data", name=name, filename=f"audio.{extension}")
        yield writer


def _open(audio: AudioSource) -> BinaryIO:
    if audio.path is None:
        return io.BytesIO(audio.data)
    try:
        return audio.path.open("rb", buffering=0)
    except OSError:
        pass
    # Outside of the except block, because the system's error contains the path.
    raise PomeloError("invalid_parameter", "The audio is no longer stored. Upload it again", field="audio")


class _File(aiohttp.Payload):
    """A file of the media type `source_type` as a part of a form. Big-endian samples are swapped; with `wav`,
    samples are preceded by a header. Unlike aiohttp's own payload, it is read in small chunks."""

    _value: BinaryIO

    def __init__(self, file: BinaryIO, content_type: str, source_type: str, *, wav: bool) -> None:
        super().__init__(file, content_type=content_type)
        self._swapper = Swapper(source_type)
        self._file_size = self._swapper.size(file.seek(0, os.SEEK_END))
        self._header = wav_header(source_type, self._file_size) if wav else b""
        self._size = len(self._header) + self._file_size
        file.seek(0)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise NotImplementedError

    async def write(self, writer: AbstractStreamWriter) -> None:
        left = self._file_size
        if self._header:
            await writer.write(self._header)
        while left:
            # Not in a thread: its switches take longer than the read, mostly of what was written just now.
            chunk = self._value.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise OSError("the file became shorter while it was sent")
            left -= len(chunk)
            await writer.write(self._swapper.swap(chunk))
