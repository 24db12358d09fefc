"""What the processes of all machines must share, and whether they do."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from pomelo import __version__
from pomelo.configuration import Configuration
from pomelo.secrets import derive_key
from pomelo.settings import Settings, SettingsError
from pomelo.stores import read_fleet
from pomelo.stores.fleet import Fleet, Process

SECRET = "secret"  # noqa: S105 (the name of a fact)
PREVIOUS = "previous secrets"
MEDIA = "media"
ARCHIVE = "archive"
PUBLIC_URL = "public URL"

_MEDIA_MARK = ".folder"
"""A file in `media/` that is never written again: all that share the folder see its inode and its time."""

log = logging.getLogger("pomelo.fleet")


class Fact(NamedTuple):
    """What processes must share. `broken`: without it, calls fail."""

    name: str
    broken: bool
    remedy: str


FACTS = (
    Fact(SECRET, True, "Set POMELO_SECRET to the same value: keys and links of one are wrong for the others"),
    Fact("catalogue", False, "Give all the same POMELO_CATALOG and plug-ins: models and prices differ"),
    Fact("plans", False, "Give all the same [plans] in pomelo.toml: limits differ"),
    Fact(MEDIA, True, "Set POMELO_MEDIA to one bucket: media of one are missing on the others"),
    Fact(ARCHIVE, True, "Set POMELO_ARCHIVE to one Postgres: usage of one is missing on the others"),
    Fact(PUBLIC_URL, False, "Set POMELO_PUBLIC_URL to the address of the load balancer"),
    Fact("providers", False, "Give all the same credentials: some models are not available everywhere"),
    Fact("alerts", False, "Set the same POMELO_ALERT_URL: what some servers see is not reported"),
    Fact("version", False, "Normal during an upgrade; finish it"),
)
"""In the order in which they are reported."""


_PLACE = ("host", "port", "dbname", "database")
"""What the query of a URL of Postgres may have of the place of its database."""


def describe_process(
    settings: Settings, configuration: Configuration, secret: bytes, started: float, clock: float
) -> Process:
    """This process, with its settings and root secret. It has served since `started` (Unix time), and its
    clock is `clock` seconds ahead of the store's."""
    host = socket.gethostname()
    catalog = configuration.registry.catalog
    names = [
        entry.name
        for entry in configuration.registry.entries.values()
        if (found := entry.located(configuration.credentials)).base_url
        and (found.api_key or not entry.key_needed)
    ]
    facts = {
        **_store_facts(settings, secret),
        "catalogue": fingerprint((catalog.models, catalog.hosts)),
        "plans": fingerprint(configuration.plans),
        MEDIA: settings.media or _folder(settings.data),
        PUBLIC_URL: settings.public_url or "not set",
        "providers": ", ".join(sorted(names)) or "none",
        "alerts": fingerprint(settings.alert_url) if settings.alert_url else "none",
        "version": __version__,
    }
    return Process(host, started, clock, facts)


def _store_facts(settings: Settings, secret: bytes) -> dict[str, str]:
    """The facts on which depends what is written to the store."""
    return {
        SECRET: secret_fingerprint(secret),
        PREVIOUS: " ".join(map(secret_fingerprint, settings.previous_secrets())),
        ARCHIVE: _archive(settings.archive_url()),
    }


def secret_fingerprint(secret: bytes) -> str:
    """What shows that two root secrets are equal, and reveals neither."""
    return derive_key(secret, "fleet").hex()[:16]


def fingerprint(value: Any) -> str:
    """A short digest, equal for equal values in all processes."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:12]


def differences(own: Process, other: Process) -> list[Fact]:
    """The facts that two processes don't share. A fact that the version of one lacks is not a difference.
    While the root secret is rotated, it is enough that each process accepts the other's."""
    return [fact for fact in FACTS if differs(fact, own, other)]


def differs(fact: Fact, own: Process, other: Process) -> bool:
    """Whether two processes don't share a fact, as in `differences`."""
    one, another = own.facts.get(fact.name), other.facts.get(fact.name)
    if one is None or another is None or one == another:
        return False
    return fact.name != SECRET or not (another in _previous(own) and one in _previous(other))


def _previous(process: Process) -> Sequence[str]:
    """The fingerprints of the previous root secrets that a process accepts."""
    return process.facts.get(PREVIOUS, "").split()


async def check_server(settings: Settings, *, replaced: str = "") -> None:
    """Checks, before anything is created, that a server with these settings may join those that run.
    `replaced` is a host whose servers end before. If one that differs was killed, its tasks are ended.

    Raises:
        SettingsError: they have another root secret, or this machine has none.
        StoreError, PomeloError: the store can't be read.
    """
    for other, _ in await _find_differences(settings, {SECRET}, replaced):
        raise _another_secret(other)


async def check_command(settings: Settings) -> None:
    """Checks, before anything is created or opened, that a command with these settings may use the store of
    the servers that run.

    Raises:
        SettingsError: they have another root secret or another archive, or this machine has no secret.
        StoreError, PomeloError: the store can't be read.
    """
    for other, found in await _find_differences(settings, {SECRET, ARCHIVE}):
        if SECRET in found:
            raise _another_secret(other)
        raise SettingsError(
            f"The server on {other.host} keeps usage records in {other.facts[ARCHIVE]}. Set "
            "POMELO_ARCHIVE to it, or run the command on that host, with the server's data folder"
        )


async def _find_differences(
    settings: Settings, names: Set[str], replaced: str = ""
) -> list[tuple[Process, Set[str]]]:
    """The running servers, without those of the host `replaced`, that differ from the settings in facts of
    these names; each with the names of the facts that differ."""
    found: list[tuple[Process, Set[str]]] = []
    for living in (False, True):  # waits only if it may have to refuse
        found = [
            (other, differing)
            for other in await read_fleet(settings.store_url(), living=living)
            if other.host != replaced and (differing := names & _store_differences(settings, other))
        ]
        if not found:
            break
    return found


def _store_differences(settings: Settings, other: Process) -> set[str]:
    """The names of the facts of the store in which settings and a process differ. A machine without a secret
    differs from all: it would make one of its own."""
    secret = settings.shared_secret()
    own = Process("", 0.0, 0.0, _store_facts(settings, secret or b""))
    return {fact.name for fact in differences(own, other)} & own.facts.keys()


def _another_secret(other: Process) -> SettingsError:
    return SettingsError(
        f"The server on {other.host} has the same store and another root secret. Set the same POMELO_SECRET "
        "on all machines"
    )


async def join(fleet: Fleet, process: Process, *, warn: bool) -> None:
    """Lists a process that starts among the others, and logs what they don't share if `warn` is set.

    Raises:
        SettingsError: another process has another root secret.
        PomeloError: store_unavailable.
    """
    logged = set()
    for other in await fleet.register(process):
        found = [fact.name for fact in differences(process, other)]
        if SECRET in found:
            raise _another_secret(other)
        if found and warn and (line := (other.host, *found)) not in logged:
            logged.add(line)
            log.warning(
                "This server, on %s, and the one on %s differ in: %s. That is normal during a change. See: "
                "pomelo doctor --fleet",
                process.host,
                other.host,
                ", ".join(found),
            )


def mark_media(settings: Settings) -> None:
    """Makes the file by which servers notice that they share a folder of media."""
    if not settings.media:
        with suppress(OSError):  # an unusable folder is reported when the media are opened
            folder = settings.data / "media"
            folder.mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(folder / _MEDIA_MARK, os.O_CREAT | os.O_CLOEXEC, 0o600))


def _folder(data: Path) -> str:
    """The media in a data folder. Machines and containers that share `media/` get the same text."""
    try:
        status = (data / "media" / _MEDIA_MARK).stat()
    except OSError:
        return f"{_own_disk()} ({fingerprint(data.resolve())})"
    return f"a folder on a disk ({fingerprint((status.st_ino, status.st_mtime_ns))})"


def _archive(url: str) -> str:
    """The archive without credentials. Containers of one machine may share its file."""
    if url.startswith("sqlite:"):
        path = Path(url.removeprefix("sqlite:")).absolute()
        try:
            status = path.stat()
        except OSError:
            return f"{_own_disk()} ({fingerprint(path)})"
        return f"a file on a disk ({fingerprint((_machine(), status.st_dev, status.st_ino))})"
    parts = urlsplit(url)
    place = [f"{name}={value}" for name, value in parse_qsl(parts.query) if name in _PLACE]
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return f"{shown}?{'&'.join(place)}" if place else shown


def _own_disk() -> str:
    return f"the disk of {socket.gethostname()}"


def _machine() -> str:
    """Identifies this machine, in all of its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # not Linux
        return socket.gethostname()


def _canonical(value: Any) -> str:
    if is_dataclass(value):
        return _joined(_canonical(getattr(value, field.name)) for field in fields(value) if field.compare)
    if isinstance(value, Mapping):
        return _joined(sorted(f"{key!r}={_canonical(each)}" for key, each in value.items()))
    if isinstance(value, Set):
        return _joined(sorted(map(_canonical, value)))
    if isinstance(value, list | tuple):
        return _joined(map(_canonical, value))
    return repr(value)


def _joined(parts: Iterable[str]) -> str:
    return f"({','.join(parts)})"
