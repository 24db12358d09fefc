"""WAV files."""

from __future__ import annotations

import struct

PCM, A_LAW, MU_LAW = 1, 6, 7


def wav_file(encoding: int, rate: int, width: int, samples: bytes) -> bytes:
    """Returns a WAV file with one channel; `width` is the number of bytes of a sample."""
    layout = struct.pack("<IHHIIHH", 16, encoding, 1, rate, rate * width, width, 8 * width)
    size = struct.pack("<I", len(samples))
    return b"".join(
        (b"RIFF", struct.pack("<I", 36 + len(samples)), b"WAVEfmt ", layout, b"data", size, samples)
    )
