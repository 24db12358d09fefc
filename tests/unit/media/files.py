"""Files in a media store, and a clock that can run ahead of the time of files."""

from __future__ import annotations

import time

from pomelo.call import Call, Principal
from pomelo.media.store import MediaStore

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 64


class Clock:
    """Unix time that a test can move ahead; it begins at the real time, as files have that."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def put(store: MediaStore, owner: str = "ann", data: bytes = PNG) -> str:
    """Stores an image and returns its id."""
    with store.writer(owner, "image/png") as writer:
        writer.write(data)
        return writer.commit().id


def names(store: MediaStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


class Access:
    """Takes every call for one of ann's in test mode."""

    async def identify(self, call: Call) -> Principal:
        return Principal("ann", "k", live=False)

    authenticate = identify
