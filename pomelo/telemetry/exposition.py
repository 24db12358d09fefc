"""Reports metrics in the text format of Prometheus: those of this process, and those of other workers.

Each process adds the label `worker`, its number, to all its values, so that a worker that is restarted is an
ordinary reset of its counters. A worker serves its text on a socket in the data folder; the first one joins
the texts of all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from pomelo.network.listening import make_free
from pomelo.telemetry.instruments import Counter, Gauge, Histogram, Instrument
from pomelo.telemetry.metrics import Metrics

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

WORKER_TIMEOUT = 1.0
"""Seconds after which a worker that does not answer is left out."""

WORKER_UP = Gauge("pomelo_worker_up", "1 if the worker has reported its metrics, otherwise 0.")

_FAMILY = "# HELP "
"""What each family of metrics begins with."""


class Exposition:
    """The metrics of a process that is the worker of this number. `others` are the sockets of the other
    workers, by number; only the first worker has them."""

    def __init__(self, metrics: Metrics, worker: int = 0, others: Mapping[int, Path] | None = None) -> None:
        self._metrics = metrics
        self._worker = str(worker)
        self._others = others or {}
        self._process = ProcessCollector(registry=None)

    async def own(self) -> str:
        """Returns the text of this process."""
        await self._metrics.refresh()
        families = list(self._families())
        # Formatting takes some milliseconds, in which no task should wait.
        return (await asyncio.to_thread(generate_latest, _Collected(families))).decode()

    async def all(self) -> str:
        """Returns the text of all workers. One that does not answer in time is missing."""
        own, *others = await asyncio.gather(self.own(), *map(_read, self._others.values()))
        assert own is not None
        up = {int(self._worker): True} | {
            number: text is not None for number, text in zip(self._others, others, strict=True)
        }
        family = GaugeMetricFamily(WORKER_UP.name, WORKER_UP.description, labels=("worker",))
        for number, answered in up.items():
            family.add_metric((str(number),), answered)
        up_text = generate_latest(_Collected([family])).decode()
        return await asyncio.to_thread(join_families, [own, *filter(None, others), up_text])

    def _families(self) -> Iterator[Metric]:
        for instrument in self._metrics.instruments:
            yield _family(instrument, self._worker)
        for family in self._process.collect():
            family.samples = [
                sample._replace(labels={**sample.labels, "worker": self._worker}) for sample in family.samples
            ]
            yield family


class _Collected(CollectorRegistry):
    """Families that were collected already."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _family(instrument: Instrument, worker: str) -> Metric:
    """Returns the current values of an instrument."""
    labels = *instrument.labels, "worker"
    if isinstance(instrument, Histogram):
        histogram = HistogramMetricFamily(instrument.name, instrument.description, labels=labels)
        bounds = [*map(str, instrument.bounds), "+Inf"]
        for values, found in instrument.values.items():
            buckets = list(zip(bounds, accumulate(found.counts), strict=True))
            histogram.add_metric((*values, worker), buckets, found.sum)
        return histogram
    make = CounterMetricFamily if instrument.kind == "counter" else GaugeMetricFamily
    family = make(instrument.name, instrument.description, labels=labels)
    readings: Iterable[tuple[tuple[str, ...], float]]
    if isinstance(instrument, Counter):
        readings = ((values, total / instrument.units) for values, total in instrument.values.items())
    else:
        assert isinstance(instrument, Gauge)
        readings = instrument.readings()
    for values, value in readings:
        family.add_metric((*values, worker), value)
    return family


def join_families(texts: Iterable[str]) -> str:
    """Joins texts of the format: the values of each family follow each other, as the format demands."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for family in f"\n{text}".split(f"\n{_FAMILY}")[1:]:
            description, kind, *values = family.rstrip("\n").split("\n")
            families.setdefault(f"{_FAMILY}{description}\n{kind}", []).extend(values)
    return "".join(f"{head}\n" + "".join(f"{line}\n" for line in lines) for head, lines in families.items())


def worker_socket(folder: Path, number: int) -> Path:
    """Returns the socket of a worker in the data folder."""
    return folder / f"worker-{number}.sock"


@asynccontextmanager
async def open_worker_socket(exposition: Exposition, path: Path) -> AsyncIterator[str]:
    """Serves the text of this process on a unix socket at `path` that only its owner can open (mode 0600);
    yields its path.

    It replaces the socket file of a process that has died. Leaving removes the file.

    Raises:
        OSError: the path is too long, another process listens there, or another file has this path.
    """

    async def write(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(WORKER_TIMEOUT):
                writer.write((await exposition.own()).encode())
                await writer.drain()
        except (OSError, TimeoutError):
            writer.transport.abort()
        finally:
            writer.close()

    make_free(path)
    umask = os.umask(0o177)  # otherwise another user could open it before a chmod
    try:
        server = await asyncio.start_unix_server(write, path)
    finally:
        os.umask(umask)
    try:
        yield str(path)
    finally:
        server.close()
        make_free(path)


async def _read(path: Path) -> str | None:
    """Returns the text of another worker; None if it does not answer in time."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(WORKER_TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return (await reader.read()).decode()
            finally:
                writer.close()
    return None
