"""`pomelo audit`: verifies all balances and bills."""

from __future__ import annotations

import typer

from pomelo.cli.operator import call_operator
from pomelo.cli.terminal import Config, Json, counted, print_json, print_line, print_pages
from pomelo.money import format_credits

_TIMEOUT = 3600.0
"""Seconds that the audit may take: it reads every record."""


def audit(config: Config = None, as_json: Json = False) -> None:
    """Recompute all balances and bills, and print differences.

    Status 1 if there are any.
    """
    from pomelo.accounts.audit import MAX_FINDINGS
    from pomelo.gen.admin.v1.admin_service_pb2 import AuditLedgerRequest
    from pomelo.settings import load

    report = call_operator(
        load(config), lambda operator: operator.audit_ledger(AuditLedgerRequest()), _TIMEOUT
    )
    findings = [
        {
            "check": finding.check,
            "subject": finding.subject,
            "difference": format_credits(finding.difference_micros),
            "detail": finding.detail,
        }
        for finding in report.findings
    ]
    cost, uncollected, difference = map(
        format_credits, (report.cost_micros, report.uncollected_micros, report.difference_micros)
    )
    if as_json:
        counts = {"wallets": report.wallets, "records": report.records, "holds": report.reservations}
        amounts = {"cost": cost, "uncollected": uncollected, "difference": difference}
        print_json(counts | amounts | {"findings": findings})
    else:
        print_line(
            f"{counted(report.wallets, 'wallet')}, {counted(report.records, 'record')}, "
            f"{counted(report.reservations, 'running task')}; "
            f"{cost} credits charged, {uncollected} uncollected"
        )
        if findings:
            print_pages([name.upper() for name in findings[0]], [[[*row.values()] for row in findings]])
        if len(findings) >= MAX_FINDINGS:
            print_line(f"Only the first {MAX_FINDINGS:,} findings are listed; the difference is that of all")
        print_line(f"Difference: {f'{difference} credits' if findings else 'none'}")
    if findings:
        raise typer.Exit(1)
