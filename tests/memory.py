"""A folder in memory for data of tests, where no write waits for the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

_FOLDER = Path("/dev/shm")
_ENOUGH = 1 << 29
"""Bytes that must be free. A container may have 64 MB."""

MEMORY = str(_FOLDER) if _FOLDER.is_dir() and shutil.disk_usage(_FOLDER).free >= _ENOUGH else None
"""The folder, or None, which means the system's folder for temporary files."""
