"""The root secret, which the data folder keeps, and the keys that are derived from it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

MIN_LENGTH = 32
"""Minimum number of characters of a root secret."""

DATABASE = "pomelo.db"
ARCHIVE = "usage.db"
"""Names of the files of SQLite in a data folder."""

_CHECK_MESSAGE = b"pomelo secret check"
_POMELO_FILES = frozenset({"secret", "secret-check", DATABASE, ARCHIVE})
"""Files that identify a folder as a Pomelo data folder."""

log = logging.getLogger("pomelo.settings")


class SecretError(Exception):
    """The root secret or its folder can't be used. The message is one line that says why and what to do."""


def derive_key(root: bytes, purpose: str) -> bytes:
    """Returns the 32-byte key for `purpose`: one step of HKDF-Expand with SHA-256 (RFC 5869).

    The key of one purpose reveals neither the root secret nor the key of another purpose.
    """
    return hmac.digest(root, purpose.encode() + b"\x01", hashlib.sha256)


def derive_keys(roots: Iterable[bytes], purpose: str) -> tuple[bytes, ...]:
    """Returns the key for `purpose` of each root secret."""
    return tuple([derive_key(root, purpose) for root in roots])


def load_root_secret(data: Path, configured: str = "", previous: Sequence[bytes] = ()) -> bytes:
    """Returns the root secret: the `configured` one, else that of the folder, created (mode 0600) if missing.

    Creates the folder, and denies other users access to it. A folder accepts only the secret that it was
    last used with, or one that replaces it: then `previous` includes the secret from before.

    Raises:
        SecretError: the folder or the secret can't be used, or it is not the folder's secret.
    """
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(data)
        path = data / "secret"
        if not configured and not path.exists():
            if (data / DATABASE).exists():
                raise _missing(path)
            write_private(path, secrets.token_hex(32), replace=False)
        secret, source = _read_secret(path, configured)
        _check_secret(data, secret, previous, source)
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(data, error) from error
    return secret


def check_root_secret(data: Path, configured: str = "", previous: Sequence[bytes] = ()) -> None:
    """Checks a folder that may not exist yet, and its root secret, as `load_root_secret` does, without
    changing anything.

    Raises:
        SecretError: the folder or the secret can't be used, or it is not the folder's secret.
    """
    noted, path = data / "secret-check", data / "secret"
    try:
        if not data.exists():
            return
        _check_folder(data)
        if not configured and not path.exists():
            if noted.exists() or (data / DATABASE).exists():
                raise _missing(path)
            return
        secret, source = _read_secret(path, configured)
        if noted.exists():
            _match(noted.read_bytes().strip(), secret, previous, source, data)
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(data, error) from error


def find_root_secret(data: Path, configured: str = "", previous: Sequence[bytes] = ()) -> bytes | None:
    """Returns the root secret if this host has one, else None. Creates no folder and no secret.

    Raises:
        SecretError: the folder has a secret that can't be used.
    """
    if configured:
        return configured.encode()
    try:
        exists = (data / "secret").exists()
    except OSError:  # the data folder of another user
        exists = False
    return load_root_secret(data, previous=previous) if exists else None


def write_private(path: Path, text: str, *, replace: bool) -> None:
    """Writes a file of mode 0600 atomically; without `replace`, an existing file stays.

    Raises:
        OSError: the file can't be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        if replace:
            Path(temporary).replace(path)
        else:
            with suppress(FileExistsError):
                os.link(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def describe_file_error(error: OSError | UnicodeDecodeError) -> str:
    """Returns why a text file could not be read, without its path."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "it is not text"


def _unusable(data: Path, error: OSError | UnicodeDecodeError) -> SecretError:
    name = getattr(error, "filename", None)
    # Temporary files begin with a dot: their names say nothing.
    is_own = isinstance(name, str) and Path(name).parent == data and not Path(name).name.startswith(".")
    return SecretError(f"POMELO_DATA: {name if is_own else data} can't be used: {describe_file_error(error)}")


def _read_secret(path: Path, configured: str) -> tuple[bytes, str]:
    """Returns the root secret, the `configured` one or that of the file, and its name in messages.

    Raises:
        SecretError: the file is damaged, or others can read it.
        OSError, UnicodeDecodeError: it can't be read.
    """
    if configured:
        return configured.encode(), "POMELO_SECRET"
    if path.stat().st_mode & 0o077:
        raise SecretError(f"{path} can be read by others. Run: chmod 600 {path}")
    secret = path.read_text().strip()
    if len(secret) < MIN_LENGTH:
        raise SecretError(f"{path} is damaged. Restore it: without it no key is valid")
    return secret.encode(), str(path)


def _missing(path: Path) -> SecretError:
    return SecretError(f"{path} is missing. Restore it: without it no key is valid")


def _check_folder(data: Path) -> int:
    """Returns the mode of a data folder.

    Raises:
        SecretError: it belongs to another user, or is open to others and has files of other programs.
    """
    status = data.stat()
    mode = stat.S_IMODE(status.st_mode)
    remedy = f"POMELO_DATA to a folder of its own, such as {data / 'pomelo'}"
    if status.st_uid != os.geteuid():
        raise SecretError(
            f"POMELO_DATA: {data} belongs to another user (uid {status.st_uid}). Run Pomelo as that user, "
            f"or set {remedy}, or run: chown -R {os.geteuid()} {data}"
        )
    names = {path.name for path in data.iterdir()} - {"lost+found"} if mode & 0o077 else set()
    if names and names.isdisjoint(_POMELO_FILES):
        raise SecretError(
            f"POMELO_DATA: {data} is open to other users (mode {mode:04o}) and has files of other programs. "
            f"Set {remedy}, or run: chmod 700 {data}"
        )
    return mode


def _make_private(data: Path) -> None:
    """Denies other users access to the data folder, where they could read or replace files.

    Raises:
        SecretError: as `_check_folder`, or the access can't be denied.
    """
    mode = _check_folder(data)
    if not mode & 0o077:
        return
    data.chmod(0o700)
    if stat.S_IMODE(data.stat().st_mode) & 0o077:
        raise SecretError(
            f"POMELO_DATA: {data} is open to other users, and its file system can't change that. "
            "Set POMELO_DATA to a folder on another file system"
        )
    log.warning("POMELO_DATA: %s was open to other users (mode %04o); it is private now", data, mode)


def _check_secret(data: Path, secret: bytes, previous: Iterable[bytes], source: str) -> None:
    """Refuses a secret under which no key in the folder is valid. Notes one that replaces the secret from
    before."""
    path = data / "secret-check"
    if not path.exists():
        write_private(path, _check_value(secret), replace=False)
    if not _match(path.read_bytes().strip(), secret, previous, source, data):
        write_private(path, _check_value(secret), replace=True)


def _match(noted: bytes, secret: bytes, previous: Iterable[bytes], source: str, data: Path) -> bool:
    """Whether the noted secret is the current one; False if it is a previous one.

    Raises:
        SecretError: it is neither.
    """
    if hmac.compare_digest(noted, _check_value(secret).encode()):
        return True
    if any(hmac.compare_digest(noted, _check_value(each).encode()) for each in previous):
        return False
    raise SecretError(
        f"{source} is not the secret that the keys in {data} were made under. Restore that secret, set "
        "POMELO_SECRET_PREVIOUS to it if you replace it, or set POMELO_DATA to another folder"
    )


def _check_value(secret: bytes) -> str:
    return hmac.digest(secret, _CHECK_MESSAGE, hashlib.sha256).hex()
