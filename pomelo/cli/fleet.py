"""`pomelo doctor --fleet`: reports what the servers of all machines must share, and whether they do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pomelo.cli.findings import Finding
from pomelo.cli.terminal import counted, explain

if TYPE_CHECKING:
    from pomelo.configuration.fleet import Fact
    from pomelo.settings import Settings
    from pomelo.stores.fleet import Process

_HERE = "these settings"
"""The settings of this command, in place of a host's name."""


def check_fleet(config: Any) -> Iterator[Finding]:
    """Compares the serving processes with each other and with the settings of this command."""
    import asyncio

    from pomelo.settings import SettingsError, load

    try:
        settings = load(config)
    except SettingsError as error:
        yield Finding("settings", "broken", str(error))
        return
    if settings.uses_sqlite:
        yield Finding(
            "fleet",
            "off",
            "SQLite serves one process: there is nothing to compare. Several machines need a Redis server in "
            "POMELO_STORE",
        )
        return
    from pomelo.configuration.fleet import FACTS
    from pomelo.stores.redis.processes import read_fleet

    try:
        processes, clock = asyncio.run(read_fleet(settings.store_url(), living=True))
    except Exception as error:
        yield Finding("store", "broken", explain(error))
        return
    yield _processes(processes)
    try:
        here = _here(settings, clock)
    except SettingsError as error:
        yield Finding("settings", "broken", str(error))
        here = None
    if here is None:
        yield Finding("secret here", "off", "this machine has no root secret yet. Set POMELO_SECRET")
    everyone = [*processes, *([here] if here is not None else [])]
    for fact in FACTS:
        yield _shared(fact, everyone)
    yield _clocks(everyone)
    if settings.media:
        yield asyncio.run(check_bucket(settings))


def _here(settings: Settings, clock: float) -> Process | None:
    """The process that these settings would start; None without a root secret."""
    from dataclasses import replace

    from pomelo.configuration import read_configuration
    from pomelo.configuration.fleet import describe_process

    secret = settings.shared_secret()
    if secret is None:
        return None
    own = describe_process(settings, read_configuration(settings), secret, time.time(), clock)
    return replace(own, host=_HERE)


async def check_bucket(settings: Settings) -> Finding:
    """Checks the bucket of media."""
    from pomelo.configuration import open_bucket
    from pomelo.settings import SettingsError

    try:
        await open_bucket(settings)
    except SettingsError as error:
        return Finding("bucket", "broken", str(error))
    return Finding("bucket", "ok", f"{settings.media} can be read and written from here")


def _processes(processes: Sequence[Process]) -> Finding:
    if not processes:
        return Finding("processes", "off", "no server runs with this store. Start one with: pomelo serve")
    counts = Counter(process.host for process in processes)
    started: dict[str, float] = {}
    for process in processes:
        started.setdefault(process.host, process.started)
    hosts = [
        f"{host}: {count}, since {datetime.fromtimestamp(started[host], UTC):%Y-%m-%dT%H:%M:%SZ}"
        for host, count in counts.items()
    ]
    total = f"{len(processes)} on {counted(len(counts), 'host')}"
    return Finding("processes", "ok", "\n".join([total, *hosts]))


def _shared(fact: Fact, processes: Sequence[Process]) -> Finding:
    """Reports one fact: the same for all processes, or each value with its hosts."""
    from pomelo.configuration.fleet import PREVIOUS, PUBLIC_URL, SECRET, differs

    hosts: dict[str, list[str]] = {}
    distinct: dict[Any, Process] = {}
    for process in processes:
        value = process.facts.get(fact.name)
        distinct[value, process.facts.get(PREVIOUS)] = process
        names = hosts.setdefault(value or "unknown to its version", [])
        if process.host not in names:
            names.append(process.host)
    lines = [f"{value}: {', '.join(names)}" for value, names in hosts.items()]
    if any(differs(fact, one, other) for one, other in combinations(distinct.values(), 2)):
        return Finding(fact.name, "broken" if fact.broken else "warning", "\n".join([fact.remedy, *lines]))
    if len(hosts) > 1:
        detail = "not yet everywhere"
        if fact.name == SECRET:
            detail = "each accepts the others'. Finish the rotation"
        return Finding(fact.name, "ok", "\n".join([detail, *lines]))
    value, names = next(iter(hosts.items()), ("unknown", []))
    if fact.name == PUBLIC_URL and value == "not set" and len(set(names) - {_HERE}) > 1:
        return Finding(fact.name, "warning", f"{value}: links name the host that made them. {fact.remedy}")
    return Finding(fact.name, "ok", "the same everywhere" if fact.name == SECRET else value)


def _clocks(processes: Sequence[Process]) -> Finding:
    from pomelo.stores.fleet import MAX_CLOCK_DIFFERENCE

    wrong = [each for each in processes if abs(each.clock) > MAX_CLOCK_DIFFERENCE]
    if wrong:
        lines = [f"{each.host}: {each.clock:+.1f} s" for each in wrong]
        return Finding(
            "clock", "warning", "\n".join(["differs from the store's. Synchronise the clocks (NTP)", *lines])
        )
    most = max((abs(each.clock) for each in processes), default=0.0)
    return Finding("clock", "ok", f"at most {most:.2f} s from the store's")
