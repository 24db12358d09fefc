"""Counters, histograms and gauges as plain values: no lock, no formatting, for one event loop.

A value is kept for each combination of label values, which must be of small, known sets. The names and the
units follow the conventions of Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

LabelValues = tuple[str, ...]

Readings = Mapping[LabelValues, float]


class Instrument:
    """What all instruments have: a name, a description of one line, and the names of its labels."""

    __slots__ = ("description", "labels", "name")

    kind: ClassVar = "gauge"
    """The type of the metric: counter, gauge or histogram."""

    def __init__(self, name: str, description: str, *labels: str) -> None:
        self.name = name
        self.description = description
        self.labels = labels


class Counter(Instrument):
    """Sums that only increase, in whole units, where `units` make one reported unit. Add to `values`: they
    are by the values of the labels, in the order of the labels' names."""

    __slots__ = ("units", "values")

    kind = "counter"

    def __init__(self, name: str, description: str, *labels: str, units: int = 1) -> None:
        super().__init__(name, description, *labels)
        self.units = units
        self.values: defaultdict[LabelValues, int] = defaultdict(int)
        if not labels:
            self.start()

    def start(self, *labels: str) -> None:
        """Reports 0 with these values of the labels until something is counted. A value that begins above 0
        is no increase for Prometheus."""
        self.values[labels] += 0


class Distribution:
    """The observations of one combination of labels: their sum, and their number in each bucket."""

    __slots__ = ("counts", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0


class Histogram(Instrument):
    """Counts observations in buckets. `bounds` are the upper bounds of the buckets, which belong to them; a
    last bucket has the rest."""

    __slots__ = ("bounds", "values")

    kind = "histogram"

    def __init__(self, name: str, description: str, *labels: str, bounds: tuple[float, ...]) -> None:
        super().__init__(name, description, *labels)
        self.bounds = bounds
        self.values: dict[LabelValues, Distribution] = {}

    def observe(self, value: float, *labels: str) -> None:
        found = self.values.get(labels)
        if found is None:
            found = self.values[labels] = Distribution(len(self.bounds) + 1)
        found.counts[bisect_left(self.bounds, value)] += 1
        found.sum += value


class Gauge(Instrument):
    """Values that are read when they are reported, from all the sources that were added."""

    __slots__ = ("_sources",)

    def __init__(self, name: str, description: str, *labels: str) -> None:
        super().__init__(name, description, *labels)
        self._sources: list[Callable[[], Readings]] = []

    def read(self, source: Callable[[], Readings]) -> None:
        """Adds a source of readings."""
        self._sources.append(source)

    def read_one(self, source: Callable[[], float], *labels: str) -> None:
        """Adds a source of one value, with these values of the labels."""
        self._sources.append(lambda: {labels: source()})

    def readings(self) -> Iterator[tuple[LabelValues, float]]:
        for source in self._sources:
            yield from source().items()


class ReadCounter(Gauge):
    """A sum that something else keeps."""

    __slots__ = ()

    kind = "counter"
