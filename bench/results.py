"""The arithmetic of the benchmark: samples of rounds, their medians and ratios, and the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Samples = Mapping[str, Sequence["Sample"]]
"""System -> its samples, one a round. The first system is the floor."""

HEAD = ("", "a second", "p50 ms", "p99 ms", "CPU µs", "x floor", "p50 x floor", "p99 x floor", "MB")


@dataclass(frozen=True, slots=True)
class Sample:
    """What one system did in one round. Times are in seconds, memory in bytes.

    `count` are requests, or tokens of paced streams; `p50` and `p99` their latencies, or the lateness of the
    tokens. `cpu` is the processor time of the system under test. `growth` is the memory of each open stream.
    `failed` requests are not in `count`.
    """

    count: int
    seconds: float
    p50: float
    p99: float
    cpu: float
    resident: int
    growth: float = 0.0
    failed: int = 0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.count / self.seconds

    @property
    def cost(self) -> float:
        """Seconds of processor time a request."""
        return self.cpu / self.count


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of the values don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(samples: Sequence[Sample], name: str) -> float:
    """The median over the rounds of an attribute of Sample."""
    return float(statistics.median(getattr(sample, name) for sample in samples))


def ratio(samples: Sequence[Sample], floor: Sequence[Sample], name: str) -> float:
    """The median of an attribute's ratios to the floor's of the same round, so that what the machine does
    meanwhile concerns both alike."""
    pairs = zip(samples, floor, strict=True)
    return float(statistics.median(getattr(one, name) / getattr(other, name) for one, other in pairs))


def rows(samples: Samples) -> list[tuple[str, ...]]:
    """The rows of one scenario, in the columns of HEAD."""
    floor = next(iter(samples.values()))
    found = []
    for system, own in samples.items():
        failed = sum(sample.failed for sample in own)
        ratios = [f"{ratio(own, floor, name):.2f}" for name in ("cost", "p50", "p99")]
        found.append(
            (
                system + (f" ({failed} failed)" if failed else ""),
                f"{median(own, 'rate'):,.0f}",
                f"{median(own, 'p50') * 1e3:.2f}",
                f"{median(own, 'p99') * 1e3:.2f}",
                f"{median(own, 'cost') * 1e6:,.0f}",
                *(ratios if own is not floor else ("1", "1", "1")),
                f"{median(own, 'resident') / 1e6:.0f}",
            )
        )
    return found


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown. All columns but the first have numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def scenario_table(title: str, samples: Samples) -> str:
    """The table of one scenario."""
    return table((title, *HEAD[1:]), rows(samples))
