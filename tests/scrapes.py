"""Metrics as Prometheus reads them, with its official parser."""

from __future__ import annotations

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, frozenset[tuple[str, str]]]
"""The name and the labels of a value."""


class Scrape:
    """The values of one text. Asserts that none is there twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        families = list(text_string_to_metric_families(text))
        samples = [sample for family in families for sample in family.samples]
        self.values: dict[Sample, float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value for sample in samples
        }
        assert len(self.values) == len(samples)
        heads = [line.split() for line in text.splitlines() if line.startswith("# TYPE ")]
        self.types = {name: kind for _, _, name, kind in heads}
        assert len(self.types) == len(heads)

    def total(self, name: str, **labels: str) -> float:
        """Returns the sum of the values of that name that have these labels."""
        return sum(
            value
            for (found, having), value in self.values.items()
            if found == name and labels.items() <= dict(having).items()
        )

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Returns the sums of the values of that name, by the values of these labels."""
        sums: dict[tuple[str, ...], float] = {}
        for (found, having), value in self.values.items():
            if found == name:
                group = tuple(dict(having)[label] for label in labels)
                sums[group] = sums.get(group, 0) + value
        return sums

    def labels(self, name: str) -> set[str]:
        """Returns the names of the labels of the values of that name."""
        return {label for found, having in self.values if found == name for label, _ in having}


async def scrape(http: aiohttp.ClientSession, admin: str) -> Scrape:
    """Scrapes the operator's server at `host:port`."""
    async with http.get(f"http://{admin}/metrics") as answer:
        assert answer.status == 200
        return Scrape(await answer.text())
