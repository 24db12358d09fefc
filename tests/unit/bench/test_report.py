"""The figures that compare scenarios, and the machine of a run."""

from __future__ import annotations

import re

from bench.processes import System
from bench.report import figures, machine
from bench.results import Sample
from bench.scenarios import AT_1, AT_32, AT_1000, BESIDE, PACED
from bench.systems import AIOHTTP, SQLITE


def samples(*costs: float, p50: float = 0.001, growth: float = 0.0) -> list[Sample]:
    """Returns a sample for each cost of a request, in microseconds."""
    return [Sample(1000, 2.0, p50, 0.01, cost / 1000, 50_000_000, growth) for cost in costs]


def test_figures_compare_the_medians_of_two_scenarios() -> None:
    results = {
        AT_32: {SQLITE: samples(100, 900, 200)},
        AT_1000: {SQLITE: samples(300, 250, 310)},
        AT_1: {SQLITE: samples(1)},
        BESIDE: {SQLITE: samples(1, p50=0.004)},
    }
    text = figures(results, {})
    assert "| CPU a request at 1,000 connections / at 32: Pomelo, SQLite | 1.50 |\n" in text
    assert "| p50 of a caller beside 100 streams / alone: Pomelo, SQLite | 4.00 |\n" in text


def test_the_memory_of_a_stream_is_that_of_the_first_round() -> None:
    first, second = samples(1, growth=60_400)[0], samples(1, growth=100)[0]
    assert "| each open stream, KB: Pomelo, SQLite | 60.4 |\n" in figures(
        {PACED: {SQLITE: [first, second]}}, {}
    )


def test_a_started_server_has_its_start_and_its_idle_memory() -> None:
    system = System([], "", ready_seconds=0.754, idle_bytes=81_000_000)
    text = figures({}, {SQLITE: system})
    assert "| ready after the start, seconds | 0.75 |\n" in text
    assert "| idle after the start, MB | 81 |\n" in text


def test_what_was_not_measured_has_no_figure() -> None:
    assert figures({AT_32: {SQLITE: samples(1)}, AT_1000: {AIOHTTP: samples(1)}}, {}) == ""


def test_the_machine_is_described_with_versions_and_the_command() -> None:
    text = machine("bench")
    assert re.search(r"^\* versions: Python 3\.\d+\.\d+, aiohttp \d+\..*, uvloop \d", text, re.MULTILINE)
    assert re.search(r"^\* machine: \d+ cores, ", text, re.MULTILINE)
    assert "* command: `python -m bench " in text
