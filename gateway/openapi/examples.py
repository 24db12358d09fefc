"""The values that examples share, small enough to be read."""

from __future__ import annotations

IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP438AAAAQBAYD718vxAAAAAElFTkSu"
    "QmCC"
)
"""An image of one orange pixel."""

AUDIO = "UklGRjQAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YRAAAACAgICAgICAgICAgICAgICA"
"""Two milliseconds of silence as a WAV file."""
