"""Audio files of one length in the containers and codecs that are in use, made by PyAV on the spot."""

import io
import random
import struct
from functools import cache
from typing import Any

import av

SECONDS = 6.0
RATE = 44_100

CASES: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp3": ("mp3", "libmp3lame", {}),
    "mp3 without a Xing header": ("mp3", "libmp3lame", {"write_xing": "0"}),
    "mp2": ("mp2", "mp2", {}),
    "wav": ("wav", "pcm_s16le", {}),
    "wav of 24 bits": ("wav", "pcm_s24le", {}),
    "wav of floats": ("wav", "pcm_f32le", {}),
    "wav of mu-law": ("wav", "pcm_mulaw", {}),
    "wav of ima adpcm": ("wav", "adpcm_ima_wav", {}),
    "wav of ms adpcm": ("wav", "adpcm_ms", {}),
    "rf64": ("wav", "pcm_s16le", {"rf64": "always"}),
    "w64": ("w64", "pcm_s16le", {}),
    "aiff": ("aiff", "pcm_s16be", {}),
    "au": ("au", "pcm_s16be", {}),
    "caf": ("caf", "pcm_s16be", {}),
    "caf of alac": ("caf", "alac", {}),
    "flac": ("flac", "flac", {}),
    "ogg opus": ("ogg", "libopus", {}),
    "ogg vorbis": ("ogg", "vorbis", {}),
    "webm opus": ("webm", "libopus", {}),
    "webm vorbis": ("webm", "vorbis", {}),
    "matroska aac": ("matroska", "aac", {}),
    "matroska pcm": ("matroska", "pcm_s16le", {}),
    "m4a": ("mp4", "aac", {}),
    "m4a of alac": ("mp4", "alac", {}),
    "fragmented mp4": ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}),
    "mp4 of opus": ("mp4", "libopus", {"strict": "-2"}),
    "3gp": ("3gp", "aac", {}),
    "adts": ("adts", "aac", {}),
    "ac3": ("ac3", "ac3", {}),
    "eac3": ("eac3", "eac3", {}),
    "wavpack": ("wv", "wavpack", {}),
    "tta": ("tta", "tta", {}),
    "mpeg-ts": ("mpegts", "aac", {}),
    "avi": ("avi", "aac", {}),
    "asf": ("asf", "wmav2", {}),
    "flv": ("flv", "aac", {}),
    "voc": ("voc", "pcm_s16le", {}),
}
"""Name -> muxer, encoder, options."""


@cache
def make(name: str, seconds: float = SECONDS) -> bytes:
    """The file of a case."""
    muxer, codec, options = CASES[name]
    rate = 48_000 if "opus" in codec else RATE
    count = int(seconds * rate)
    out = io.BytesIO()
    with av.open(out, "w", format=muxer, options=options) as container:
        stream: Any = container.add_stream(codec, rate=rate, options={"strict": "-2"})
        layout = "stereo" if codec == "vorbis" else "mono"  # the one that its encoder takes
        stream.layout = layout
        stream.bit_rate = 128_000
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or 1024)
        frame = av.AudioFrame(format="s16", layout="mono", samples=count)
        frame.planes[0].update(random.Random(7).randbytes(2 * count))
        frame.sample_rate = rate
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            for packet in stream.encode(piece):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return out.getvalue()


def wav(
    seconds: float, *, rate: int = 16_000, per_second: int | None = None, data: int | None = None
) -> bytes:
    """A WAV file whose header may claim another byte rate or another size."""
    body = bytes(int(seconds * rate) * 2)
    head = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * 2 if per_second is None else per_second, 2, 16)
    size = len(body) if data is None else data
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(body))
        + b"WAVEfmt "
        + head
        + b"data"
        + struct.pack("<I", size)
        + body
    )


FRAME = bytes.fromhex("fffb9064") + bytes(413)
"""A frame of MP3: 1,152 samples at 44,100 Hz, 128 kbit/s."""


def mp3(seconds: float) -> bytes:
    """MP3 without any header."""
    return FRAME * round(seconds * 44_100 / 1152)
