"""`pomelo audit`: verifies all balances and bills."""

from __future__ import annotations

import typer

from pomelo.cli.operator import asked
from pomelo.cli.terminal import Config, Json, print_json, print_line, print_table

_TIMEOUT = 3600.0
"""Seconds that the audit may take: it reads every record."""


def audit(config: Config = None, as_json: Json = False) -> None:
    """Recompute every balance and bill from the records, and print the differences.

    Status 1 if there are any.
    """
    from pomelo.gen.v1.admin_service_pb2 import AuditRequest
    from pomelo.money import format_credits

    report = asked(config, "Audit", AuditRequest(), _TIMEOUT)
    if as_json:
        print_json(
            {
                "wallets": report.wallets,
                "records": report.records,
                "holds": report.holds,
                "cost": format_credits(report.cost_micros),
                "uncollected": format_credits(report.uncollected_micros),
                "difference": format_credits(report.difference_micros),
                "findings": [
                    {
                        "check": finding.check,
                        "subject": finding.subject,
                        "difference": format_credits(finding.difference_micros),
                        "detail": finding.detail,
                    }
                    for finding in report.findings
                ],
            }
        )
    else:
        print_line(
            f"{report.wallets} wallets, {report.records} records, {report.holds} running tasks; "
            f"{format_credits(report.cost_micros)} credits charged, "
            f"{format_credits(report.uncollected_micros)} uncollected"
        )
        if report.findings:
            print_table(
                ("CHECK", "SUBJECT", "DIFFERENCE", "DETAIL"),
                [
                    (
                        finding.check,
                        finding.subject,
                        format_credits(finding.difference_micros),
                        finding.detail,
                    )
                    for finding in report.findings
                ],
            )
        difference = f"{format_credits(report.difference_micros)} credits" if report.findings else "none"
        print_line(f"Difference: {difference}")
    if report.findings:
        raise typer.Exit(1)
