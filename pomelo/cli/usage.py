"""`pomelo usage`: prints usage records or their sums as a table, JSON or CSV.

Pages are printed as they arrive, so that a long list needs little memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli.operator import call_operator
from pomelo.cli.safe_text import csv_cell
from pomelo.cli.terminal import (
    Config,
    Json,
    format_time,
    parse_time,
    print_array,
    print_table,
    task_type_name,
)
from pomelo.money import format_credits

if TYPE_CHECKING:
    from pomelo.gen.v1.account_service_pb2 import UsageRecord, UsageTotal

_PAGE_SIZE = 1_000
_COUNTS = (
    *("input_tokens", "cached_input_tokens", "cache_write_input_tokens", "output_tokens"),
    *("characters", "images", "audio_seconds", "output_bytes"),
)
_TIMEOUT = 600.0
"""Seconds: the command may read every record."""


class By(StrEnum):
    model = "model"
    key = "key"
    day = "day"
    account = "account"


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


def usage(
    by: Annotated[By | None, typer.Option("--by", help="Print sums instead of records.")] = None,
    since: Annotated[
        str, typer.Option("--from", metavar="WHEN", help="Only from this date or time (UTC).")
    ] = "",
    until: Annotated[
        str, typer.Option("--to", metavar="WHEN", help="Only before this date or time (UTC).")
    ] = "",
    account: Annotated[str, typer.Option(metavar="NAME", help="Only tasks of this account.")] = "",
    model: Annotated[str, typer.Option(metavar="M", help="Only tasks of this model.")] = "",
    key: Annotated[str, typer.Option(metavar="KEY_ID", help="Only tasks of this key.")] = "",
    live: Annotated[
        bool | None, typer.Option("--live/--test", help="Only tasks of live or test keys. Default: both.")
    ] = None,
    output_format: Annotated[Format, typer.Option("--format", help="The output format.")] = Format.table,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List usage records, newest first, or their sums. Costs are in credits."""
    from pomelo.gen.v1 import account_service_pb2 as pb
    from pomelo.gen.v1 import admin_service_pb2 as admin_pb

    query = pb.ListUsageRequest(page_size=_PAGE_SIZE, model=model, key_id=key)
    for text, hint, field in ((since, "--from", query.from_time), (until, "--to", query.to_time)):
        if text:
            field.FromNanoseconds(_nanoseconds(text, hint))
    if by is not None:
        query.page_size = 0
        query.group_by = pb.UsageGroup.Value(f"USAGE_GROUP_{by.name.upper()}")
    mode = admin_pb.KEY_MODE_UNSPECIFIED
    if live is not None:
        mode = admin_pb.KEY_MODE_LIVE if live else admin_pb.KEY_MODE_TEST
    request = admin_pb.QueryUsageRequest(query=query, account=account, mode=mode)
    pages = _pages(config, request, by.value if by is not None else None)
    {Format.table: _print_tables, Format.json: _print_json, Format.csv: _print_csv}[
        Format.json if as_json else output_format
    ](pages)


def _nanoseconds(text: str, hint: str) -> int:
    seconds = parse_time(text)
    if seconds is None:
        raise typer.BadParameter(
            f"{text!r} is no date or time such as 2026-11-24 or 2026-11-24T12:00Z", param_hint=hint
        )
    return int(seconds * 1000) * 1_000_000


def _pages(config: Any, request: Any, by: str | None) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of each page; at least one page, which may be empty."""
    from pomelo.settings import load

    settings = load(config)
    while True:
        found = call_operator(settings, lambda operator: operator.query_usage(request), _TIMEOUT).usage
        if by is not None:
            yield [_total(row, by) for row in found.totals]
        else:
            yield [_record(row) for row in found.records]
        if not found.next_page_token:
            return
        request.query.page_token = found.next_page_token


def _record(row: UsageRecord) -> dict[str, Any]:
    from pomelo.gen.v1.account_service_pb2 import UsageSource

    return {
        "time": format_time(row, "time"),
        "id": row.id,
        "request_id": row.request_id,
        "account": row.account,
        "key_id": row.key_id,
        "mode": "live" if row.live else "test",
        "wire": row.wire,
        "model": row.model,
        "type": task_type_name(row.task_type),
        "provider": row.provider,
        "provider_model": row.provider_model,
        **_counts(row),
        "processing_ms": row.processing_ms,
        "first_byte_ms": row.first_byte_ms,
        "source": UsageSource.Name(row.source).removeprefix("USAGE_SOURCE_").lower(),
        "complete": row.complete,
        "price_version": row.price_version,
        "provider_cost": format_credits(row.provider_cost_micros),
        "cost": format_credits(row.cost_micros),
    }


def _total(row: UsageTotal, by: str) -> dict[str, Any]:
    return {by: row.group, "tasks": row.tasks, **_counts(row), "cost": format_credits(row.cost_micros)}


def _counts(row: UsageRecord | UsageTotal) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _COUNTS}


# --- printing

_COLUMNS = (
    *(("TIME", "time"), ("ACCOUNT", "account"), ("MODE", "mode")),
    *(("MODEL", "model"), ("PROVIDER", "provider")),
    *(("INPUT", "input_tokens"), ("CACHED", "cached_input_tokens"), ("OUTPUT", "output_tokens")),
    *(("CHARS", "characters"), ("IMAGES", "images"), ("SECONDS", "audio_seconds")),
    *(("CREDITS", "cost"), ("ID", "id")),
)
"""Columns of a record that fit a terminal."""


def _print_tables(pages: Iterator[list[dict[str, Any]]]) -> None:
    for number, rows in enumerate(pages):
        if not rows:
            if not number:
                typer.echo("Nothing was used.", err=True)
            continue
        columns: Sequence[tuple[str, str]] = _COLUMNS
        if "id" not in rows[0]:
            columns = [(name.upper(), name) for name in rows[0]]
        print_table(
            [name for name, _ in columns], [[_cell(row[field]) for _, field in columns] for row in rows]
        )


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print_json(pages: Iterator[list[dict[str, Any]]]) -> None:
    print_array(row for rows in pages for row in rows)


def _print_csv(pages: Iterator[list[dict[str, Any]]]) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, rows in enumerate(pages):
        if rows and not number:
            writer.writerow(rows[0])
        writer.writerows([csv_cell(value) for value in row.values()] for row in rows)
