"""Measures what Pomelo adds to a call, beside bare proxies. docs/benchmarks.md explains it and has results.

    python -m bench [--only PART…] [--peers] [--rounds 3] [--seconds 2] [--out FILE]

The load and the vendor run on one core, the system under test on another. The systems of a scenario take
turns, round by round, so that what else the machine does hits all of them alike. Processor time is what the
kernel accounts to the processes under test, with all their threads; that of Redis is not counted.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import uvloop

from bench import peers
from bench.measure import measure
from bench.processes import cores, pinned
from bench.report import figures, machine
from bench.results import Sample, scenario_table
from bench.scenarios import PEER_SCENARIOS, SCENARIOS, Scenario
from bench.systems import Systems
from pomelo.runtime.process import raise_descriptor_limit


async def run_scenario(
    scenario: Scenario, systems: Systems, rounds: int, seconds: float
) -> tuple[dict[str, list[Sample]], list[str]]:
    """Measures the systems of a scenario in turns; every second round in reverse. A system that fails is left
    out. Returns the samples, and why systems failed.

    Raises:
        OSError, RuntimeError: the floor fails.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in scenario.systems}
    failures = []
    for number in range(rounds):
        for name in scenario.systems[:: -1 if number % 2 else 1]:
            if name not in samples:
                continue
            try:
                samples[name].append(await measure(scenario, await systems.get(name), seconds))
            except (OSError, RuntimeError) as error:
                if name == scenario.systems[0]:
                    raise
                del samples[name]
                failures.append(f"{name}: {error}")
    return samples, failures


async def run(scenarios: Sequence[Scenario], rounds: int, seconds: float, out: TextIO) -> bool:
    """Measures scenarios and writes their tables as they come, then the figures that compare them. Returns
    whether all could be measured."""
    gc.freeze()
    raise_descriptor_limit()
    load, under_test = cores()
    out.write(machine("bench") + "\n")
    results: dict[str, dict[str, list[Sample]]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            systems = Systems(stack, Path(folder), (load, under_test))
            with pinned(load):
                for scenario in scenarios:
                    samples, failed = await run_scenario(scenario, systems, rounds, seconds)
                    results[scenario.name] = samples
                    failures += failed
                    table = scenario_table(scenario.name, samples)
                    out.write("\n".join([table, *(f"{line}\n" for line in failed), ""]))
                    out.flush()
            out.write(figures(results, systems.started))
    return not failures


def installed_peers() -> list[Scenario]:
    """The scenarios of the other gateways, with those that are installed. Says which are not."""
    found = peers.find()
    for name in peers.NAMES:
        if name not in found:
            sys.stderr.write(
                f"{name} is not installed: it is left out. bench/peers.py says what is looked for\n"
            )
    return [
        replace(
            each, systems=tuple(name for name in each.systems if name in found or name not in peers.NAMES)
        )
        for each in PEER_SCENARIOS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What Pomelo adds to a call.")
    parser.add_argument(
        "--only", nargs="*", metavar="PART", help="scenarios whose names contain one of these"
    )
    parser.add_argument("--peers", action="store_true", help="other gateways, where they are installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each system in each round")
    parser.add_argument("--out", type=Path, help="the file for the tables; default: standard output")
    given = parser.parse_args()
    scenarios = installed_peers() if given.peers else SCENARIOS
    chosen = [each for each in scenarios if not given.only or any(part in each.name for part in given.only)]
    if not chosen:
        parser.error("no scenario has such a name:\n" + "\n".join(each.name for each in scenarios))
    with given.out.open("w") if given.out else sys.stdout as out:
        is_complete = uvloop.run(run(chosen, given.rounds, given.seconds, out))
    sys.exit(not is_complete)


if __name__ == "__main__":
    main()
