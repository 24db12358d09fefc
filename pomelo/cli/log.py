"""`pomelo log`: what the operator has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli.operator import list_pages
from pomelo.cli.terminal import (
    Config,
    Json,
    format_time,
    mode_name,
    print_array,
    print_pages,
    read_time,
    unix_time,
)

if TYPE_CHECKING:
    from pomelo.gen.admin.v1.admin_service_pb2 import Act


def log(
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Only changes of this account.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Only from this date or time (UTC).")
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List changes of accounts, credits and keys, newest first."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    query = pb.ListActsRequest(account_id=account or "")
    if since:
        read_time(since, "--since", query.start_time)
    found = list_pages(load(config), query, lambda operator: operator.list_acts(query))
    if as_json:
        print_array(_json(act) for page in found for act in page.acts)
        return
    pages = (
        [
            (
                format_time(act, "time") or "",
                act.action,
                act.account_id,
                _mode(act) or "",
                act.key_id,
                f"{act.old_value} -> {act.new_value}" if act.old_value else act.new_value,
                act.note,
            )
            for act in page.acts
        ]
        for page in found
    )
    print_pages(("TIME", "ACTION", "ACCOUNT", "MODE", "KEY_ID", "CHANGE", "NOTE"), pages)


def _mode(act: Act) -> str | None:
    return mode_name(act.mode) if act.mode else None


def _json(act: Act) -> dict[str, Any]:
    return {
        "id": act.id,
        "object": "act",
        "time": unix_time(act, "time"),
        "action": act.action,
        "account": act.account_id,
        "mode": _mode(act),
        "key_id": act.key_id or None,
        "old": act.old_value,
        "new": act.new_value,
        "note": act.note,
    }
