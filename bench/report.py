"""The report of a run besides its tables: the machine, and the figures that compare scenarios."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bench.processes import ROOT, System
from bench.results import Samples, median, table
from bench.scenarios import AT_1, AT_32, AT_1000, BESIDE, PACED
from bench.systems import SQLITE
from tests.redis_server import binary

_PACKAGES = ("aiohttp", "grpcio", "httptools", "protobuf", "redis", "uvloop")


def machine(module: str) -> str:
    """Says when, on what and with which versions a run took place, in Markdown."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    redis = " ".join(_output(binary(), "--version").split()[:3])
    return (
        f"* date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n"
        f"* commit: {_output('git', 'rev-parse', '--short', 'HEAD')}\n"
        f"* machine: {os.cpu_count()} cores, {_processor()}, {platform.system()} {platform.release()}\n"
        f"* versions: Python {platform.python_version()}, {packages}; {redis}\n"
        f"* command: `python -m {module} {' '.join(sys.argv[1:])}`\n"
    )


def figures(results: Mapping[str, Samples], systems: Mapping[str, System]) -> str:
    """The table of the figures that compare scenarios: those whose scenarios were measured."""
    found: list[tuple[str, str]] = []
    if SQLITE in systems:
        system = systems[SQLITE]
        found.append(("ready after the start, seconds", f"{system.ready_seconds:.2f}"))
        found.append(("idle after the start, MB", f"{system.idle_bytes / 1e6:.0f}"))
    for name, samples in results.get(PACED, {}).items():
        # The first round: later ones reuse the memory of the earlier.
        found.append((f"each open stream, KB: {name}", f"{samples[0].growth / 1e3:.1f}"))
    for title, one, other, attribute in (
        ("CPU a request at 1,000 connections / at 32", AT_1000, AT_32, "cost"),
        ("p50 of a caller beside 100 streams / alone", BESIDE, AT_1, "p50"),
    ):
        pair = [results[name][SQLITE] for name in (one, other) if SQLITE in results.get(name, ())]
        if len(pair) == 2:
            quotient = median(pair[0], attribute) / median(pair[1], attribute)
            found.append((f"{title}: {SQLITE}", f"{quotient:.2f}"))
    return table(("figure", "value"), found) if found else ""


def _output(*command: str) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    return result.stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
