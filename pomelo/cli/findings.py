"""What a check has found, and its report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import typer

from pomelo.cli.terminal import print_json, print_line


class Finding(NamedTuple):
    """The result of one check. `state` is ok, off (not configured and not needed), warning (it works, but
    should be corrected) or broken."""

    name: str
    state: str
    detail: str


def report(found: Iterable[Finding], as_json: bool = False) -> None:
    """Prints findings, each when it is made.

    Raises:
        typer.Exit: with status 1; something is broken.
    """
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            first, *more = finding.detail.split("\n")
            print_line(f"{finding.state:<7} {finding.name:<13} {first}")
            for line in more:
                print_line(f"{'':<21} {line}")
    if as_json:
        print_json([finding._asdict() for finding in findings])
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
