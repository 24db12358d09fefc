"""Limits the stored bytes of media: per owner, in total, and by the disk space that the ledger needs.

Bytes are counted before they are written. A process counts exactly what it stores and deletes itself; it
learns from the last scan what other processes did in the same folder. The free disk space is read from the
operating system, so it is exact for all processes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pomelo.errors import PomeloError

BLOCK = 4096
"""The block size in bytes by which files are counted, as most file systems allocate them."""

_MIB = 1024 * 1024
_GIB = 1024 * _MIB

DEFAULT_RESERVE = 512 * _MIB
"""Disk bytes that media leave free by default; a tenth of the disk if that is less."""

_MIN_FREE_FILES = 1024
"""Files that media leave free on a file system with a fixed number of them."""

_LOG_INTERVAL = 60.0
"""Seconds between two log lines about missing space."""

log = logging.getLogger("pomelo.media")


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Limits in bytes: `total` for all media, `account` for those of one account and mode; `reserve` stays
    free on the disk for the ledger (None: DEFAULT_RESERVE)."""

    total: int = 10 * _GIB
    account: int = _GIB
    reserve: int | None = None


def disk_size(size: int) -> int:
    """Bytes that a file of `size` bytes occupies on the disk."""
    return -(-size // BLOCK) * BLOCK


def missing_space(folder: Path, size: int, reserve: int | None) -> str:
    """Says why the disk of a folder can't take `size` bytes of media; empty: it can. `reserve` as in
    `MediaLimits`.

    Raises:
        OSError: the folder can't be read.
    """
    disk = os.statvfs(folder)
    if reserve is None:
        reserve = min(DEFAULT_RESERVE, disk.f_blocks * disk.f_frsize // 10)
    free = disk.f_bavail * disk.f_frsize
    if free - size < reserve:
        return (
            f"{free:,} bytes are free on the disk of {folder}, and POMELO_DISK_RESERVE keeps {reserve:,} of "
            "them for the ledger"
        )
    if reserve and disk.f_files and disk.f_favail < _MIN_FREE_FILES:
        return f"the disk of {folder} can hold only {disk.f_favail:,} more files"
    return ""


class Quota:
    """Counts the bytes stored in `folder`, by owner. Not thread-safe."""

    def __init__(self, folder: Path, limits: MediaLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._stored: dict[bytes, int] = {}
        self.total = 0
        """Bytes that all media occupy."""
        self._logged = float("-inf")
        self._refusing = False
        """Whether the log said that media are refused, and none were stored since then."""

    def stored(self, owner: bytes) -> int:
        """Bytes that an owner's media occupy."""
        return self._stored.get(owner, 0)

    def add(self, owner: bytes, size: int) -> None:
        """Counts `size` bytes that are about to be stored.

        Raises:
            PomeloError: payload_too_large (the owner's limit), store_unavailable (the total); nothing was
                counted.
        """
        if size <= 0:
            return
        self._check(owner, size, size, "Wait until some expire, or send less")
        self._stored[owner] = self.stored(owner) + size
        self.total += size

    def file_written(self) -> None:
        """Logs that media can be stored again, if they were refused before."""
        if self._refusing:
            self._refusing = False
            log.warning("Media can be stored again")

    def remove(self, owner: bytes, size: int) -> None:
        """Subtracts `size` bytes that are no longer stored."""
        left = self.stored(owner) - size
        if left > 0:
            self._stored[owner] = left
        else:
            self._stored.pop(owner, None)
        self.total = max(0, self.total - size)

    def load(self, stored: Mapping[bytes, int]) -> None:
        """Replaces the counts with those of a scan of the folder."""
        self._stored = {owner: size for owner, size in stored.items() if size > 0}
        self.total = sum(self._stored.values())

    def check_answer(self, owner: bytes, size: int) -> None:
        """Refuses a task before a provider is paid if there is no space for its answer of about `size` bytes.

        Raises:
            PomeloError: payload_too_large (the owner's limit), store_unavailable (the total, or the disk).
        """
        # An estimate above a small limit must not refuse every answer.
        account_size = min(size, max(self._limits.account // 4, BLOCK))
        total_size = min(size, max(self._limits.total // 4, BLOCK))
        remedy = "Wait until some expire, or ask for response_format b64_json without an Idempotency-Key"
        self._check(owner, account_size, total_size, remedy)
        self.check_disk(size)

    def _check(self, owner: bytes, account_size: int, total_size: int, remedy: str) -> None:
        used, limits = self.stored(owner), self._limits
        if used + account_size > limits.account:
            raise PomeloError(
                "payload_too_large",
                f"The media of this account occupy {used:,} of {limits.account:,} bytes. {remedy}",
                values={"usedBytes": used, "maxBytes": limits.account},
            )
        if self.total + total_size > limits.total:
            raise self._no_space(
                f"media occupy {self.total:,} bytes, and POMELO_MEDIA_LIMIT is {limits.total:,}"
            )

    def check_disk(self, size: int) -> None:
        """Refuses `size` bytes if the disk's free space would fall below the reserve.

        Raises:
            PomeloError: store_unavailable.
        """
        try:
            reason = missing_space(self._folder, size, self._limits.reserve)
        except OSError as error:
            self._log(f"{self._folder} can't be read: {error.strerror}")
            raise PomeloError("store_unavailable") from error
        if reason:
            raise self._no_space(reason)

    def failed(self, error: OSError) -> PomeloError:
        """Logs why a file could not be written, at most once a minute, and returns the error to raise."""
        return self._no_space(f"a file in {self._folder} can't be written: {error.strerror}")

    def _no_space(self, reason: str) -> PomeloError:
        """Logs the reason, and returns the error of a full disk, or of media at their total limit."""
        self._log(reason)
        return PomeloError("store_unavailable", "No space is left for media. Retry later")

    def _log(self, reason: str) -> None:
        """Logs why media are refused, at most once a minute."""
        now = time.monotonic()
        if now - self._logged >= _LOG_INTERVAL:
            self._logged = now
            log.warning("Refused to store media: %s", reason)
            self._refusing = True
