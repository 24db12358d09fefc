"""Forms with a sound in them, as ElevenLabs takes them; `elevenlabs` calls `form`.

A sound is read from its file while it is sent, and never held whole. No name that a caller or the media store
gave to it leaves the house.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import aiohttp

from pomelo.errors import PomeloError
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
        kind = audio.content_type.replace(" ", "").lower()
        more = {"file_format": "pcm_s16le_16"} if kind == _RAW else {}
        for field, value in {**fields, **more}.items():
            writer.append(value).set_content_disposition("form-data", name=field)
        kind = kind if _TYPE.fullmatch(kind) else _ANY
        part = writer.append(file, {"Content-Type": kind})
        ending = _ENDINGS.get(kind.partition(";")[0], "bin")
        part.set_content_disposition("form-data", name=name, filename=f"audio.{ending}")
        yield writer


def _opened(audio: AudioSource) -> io.BufferedReader | io.BytesIO:
    if audio.path is None:
        return io.BytesIO(audio.data)
    try:
        return audio.path.open("rb")
    except OSError:
        pass
    # Outside of the except block: the system's error has the path.
    raise PomeloError("invalid_parameter", "The audio is no longer kept. Upload it again", field="audio")
