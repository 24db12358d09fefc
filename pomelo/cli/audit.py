"""`pomelo audit`: whether all balances and bills add up."""

from __future__ import annotations

import typer

from pomelo.cli.operator import call_operator
from pomelo.cli.terminal import Config, Json, print_json, print_table, say

_TIMEOUT = 3600.0
"""Seconds: every record there is is read."""


def audit(config: Config = None, as_json: Json = False) -> None:
    """Recompute every balance and bill from the records, and print the difference.

    Status 1 when there is one.
    """
    from pomelo.gen.v1.admin_service_pb2 import AuditRequest
    from pomelo.money import format_credits
    from pomelo.settings import load

    found = call_operator(load(config), lambda operator: operator.audit(AuditRequest()), _TIMEOUT)
    if as_json:
        print_json(
            {
                "wallets": found.wallets,
                "records": found.records,
                "holds": found.holds,
                "cost": format_credits(found.cost_micros),
                "uncollected": format_credits(found.uncollected_micros),
                "difference": format_credits(found.difference_micros),
                "findings": [
                    {
                        "check": finding.check,
                        "subject": finding.subject,
                        "difference": format_credits(finding.difference_micros),
                        "detail": finding.detail,
                    }
                    for finding in found.findings
                ],
            }
        )
    else:
        say(
            f"{found.wallets} sides of accounts, {found.records} records, {found.holds} running tasks; "
            f"{format_credits(found.cost_micros)} credits charged, "
            f"{format_credits(found.uncollected_micros)} uncollected"
        )
        if found.findings:
            print_table(
                ("CHECK", "SUBJECT", "DIFFERENCE", "DETAIL"),
                [
                    (one.check, one.subject, format_credits(one.difference_micros), one.detail)
                    for one in found.findings
                ],
            )
        differs = f"{format_credits(found.difference_micros)} credits" if found.findings else "none"
        say(f"Difference: {differs}")
    if found.findings:
        raise typer.Exit(1)
