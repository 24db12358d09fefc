"""`pomelo usage`: prints usage records or their sums as a table, JSON or CSV.

Pages are printed as they arrive, so that a long list needs little memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Iterator, Sequence
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli.operator import list_pages
from pomelo.cli.safe_text import csv_cell
from pomelo.cli.terminal import (
    Config,
    Json,
    format_time,
    mode_name,
    print_array,
    print_pages,
    read_time,
    task_type_name,
    value_name,
)
from pomelo.money import format_credits

if TYPE_CHECKING:
    from pomelo.gen.admin.v1.admin_service_pb2 import UsageGrouping
    from pomelo.gen.v1.account_service_pb2 import UsageRecord, UsageSum
    from pomelo.gen.v1.usage_pb2 import Usage
    from pomelo.service import Operator

_COUNTS = (
    *("input_tokens", "cached_input_tokens", "cache_write_input_tokens", "output_tokens"),
    *("characters", "images", "audio_seconds"),
)
_NAMES = {"account_id": "--account", "filter.start_time": "--from", "filter.end_time": "--to"}
_TIMEOUT = 600.0
"""Seconds: the command may read every record."""

_SUMS_SIZE = 10_000
"""Sums on a page."""


class By(StrEnum):
    model = "model"
    key = "key"
    day = "day"
    account = "account"
    provider = "provider"
    user = "user"
    code = "code"


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


def usage(
    by: Annotated[By | None, typer.Option("--by", help="Print sums instead of records.")] = None,
    since: Annotated[
        str | None, typer.Option("--from", metavar="WHEN", help="Only from this date or time (UTC).")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--to", metavar="WHEN", help="Only before this date or time (UTC).")
    ] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Only tasks of this account.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Only tasks of this model.")] = None,
    key: Annotated[str | None, typer.Option(metavar="KEY_ID", help="Only tasks of this key.")] = None,
    live: Annotated[
        bool | None, typer.Option("--live/--test", help="Only tasks of live or test keys. Default: both.")
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only tasks that failed, with the code of their error.")
    ] = False,
    output_format: Annotated[Format, typer.Option("--format", help="The output format.")] = Format.table,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List the usage records of billed tasks, or their sums. Records are newest first, costs in credits."""
    from pomelo.accounts.modes import to_mode
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    request: Any
    if by is None:
        request = pb.ListUsageRequest(account_id=account or "")
    else:
        # Each page sums all records again.
        request = pb.SumUsageRequest(account_id=account or "", group_by=[_grouping(by)], page_size=_SUMS_SIZE)
    if live is not None:
        request.mode = to_mode(live)
    request.filter.model, request.filter.key_id, request.filter.failed = model or "", key or "", failed
    if since:
        read_time(since, "--from", request.filter.start_time)
    if until:
        read_time(until, "--to", request.filter.end_time)

    def read(operator: Operator) -> Awaitable[Any]:
        return operator.list_usage(request) if by is None else operator.sum_usage(request)

    responses = list_pages(load(config), request, read, _TIMEOUT, names=_NAMES)
    pages = (page.records if by is None else page.sums for page in responses)
    if as_json or output_format is Format.json:
        _print_json(pages)
        return
    names = _key_names(config, account or "") if by is By.key else None
    rows = ([_record(row) if by is None else _sum(row, by.value, names) for row in page] for page in pages)
    if output_format is Format.csv:
        _print_csv(rows)
    else:
        _print_table(rows, _RECORD_COLUMNS if by is None else None, failed=failed)


def _grouping(by: By) -> UsageGrouping:
    from pomelo.gen.admin.v1.admin_service_pb2 import OPERATOR_DIMENSION_ACCOUNT, UsageGrouping
    from pomelo.gen.v1.account_service_pb2 import UsageDimension

    if by is By.account:
        return UsageGrouping(operator_dimension=OPERATOR_DIMENSION_ACCOUNT)
    return UsageGrouping(dimension=UsageDimension.Value(f"USAGE_DIMENSION_{by.name.upper()}"))


def _key_names(config: Any, account: str) -> dict[str, str]:
    """Returns the names of keys by their ids."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    query = pb.ListKeysRequest(account_id=account)
    pages = list_pages(load(config), query, lambda operator: operator.list_keys(query))
    return {key.id: key.name for page in pages for key in page.keys}


def _record(row: UsageRecord) -> dict[str, Any]:
    from pomelo.gen.v1.account_service_pb2 import UsageSource

    return {
        "time": format_time(row, "end_time"),
        "id": row.id,
        "request_id": row.request_id,
        "account": row.account_id,
        "key_id": row.key_id,
        "mode": mode_name(row.mode),
        "wire": row.protocol,
        "model": row.model,
        "type": task_type_name(row.task_type),
        "provider": row.provider,
        "provider_model": row.provider_model,
        **_counts(row.usage),
        "output_bytes": row.output_bytes,
        "processing_ms": row.processing_ms,
        "first_byte_ms": row.first_byte_ms,
        "source": value_name(UsageSource, row.source),
        "complete": row.complete,
        "code": row.code,
        "price_version": row.price_version,
        "provider_cost": format_credits(row.provider_cost_micros),
        "cost": format_credits(row.cost_micros),
        # Last, so that older columns keep their positions.
        "user": row.user,
        "metadata": json.dumps(dict(row.metadata), ensure_ascii=False) if row.metadata else "",
    }


def _sum(row: UsageSum, by: str, names: dict[str, str] | None) -> dict[str, Any]:
    """Returns a sum; `names` are those of keys, by id."""
    return {
        by: row.groups[0],
        **({} if names is None else {"name": names.get(row.groups[0], "")}),
        "tasks": row.tasks,
        **_counts(row.usage),
        "output_bytes": row.output_bytes,
        "cost": format_credits(row.cost_micros),
    }


def _counts(usage: Usage) -> dict[str, Any]:
    return {name: getattr(usage, name) for name in _COUNTS}


# --- printing

_RECORD_COLUMNS = (
    *(("TIME", "time"), ("ACCOUNT", "account"), ("MODE", "mode")),
    *(("MODEL", "model"), ("PROVIDER", "provider"), ("CODE", "code")),
    *(("INPUT", "input_tokens"), ("CACHED", "cached_input_tokens"), ("OUTPUT", "output_tokens")),
    *(("CHARS", "characters"), ("IMAGES", "images"), ("SECONDS", "audio_seconds")),
    *(("CREDITS", "cost"), ("ID", "id")),
)
"""Columns of a record that fit a wide terminal."""

_OPTIONAL = ("CACHED", "SECONDS", "CHARS", "IMAGES", "MODE", "INPUT", "OUTPUT", "PROVIDER", "ACCOUNT")
"""Columns that a narrow terminal goes without, the first one first."""

_TOTAL_OPTIONAL = (
    *("CACHE_WRITE_INPUT_TOKENS", "CACHED_INPUT_TOKENS", "AUDIO_SECONDS", "CHARACTERS", "IMAGES"),
    *("OUTPUT_BYTES", "INPUT_TOKENS", "OUTPUT_TOKENS"),
)


def _print_table(
    pages: Iterator[list[dict[str, Any]]], columns: Sequence[tuple[str, str]] | None, *, failed: bool
) -> None:
    """Prints all pages as one table. `columns` are the names and the fields to print; None: all."""
    first = next(pages)
    if not first:
        typer.echo("Nothing has failed." if failed else "Nothing was used.", err=True)
        return
    shown = columns or [(name.upper(), name) for name in first[0]]
    if columns and sys.stdout.isatty() and not any(row["code"] for row in first):
        shown = [column for column in columns if column[1] != "code"]
    print_pages(
        [name for name, _ in shown],
        ([[_cell(row[field]) for _, field in shown] for row in rows] for rows in chain([first], pages)),
        optional=_OPTIONAL if columns else _TOTAL_OPTIONAL,
    )


def _cell(value: Any) -> str:
    # Seconds are whole milliseconds.
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _print_json(pages: Iterator[Sequence[Any]]) -> None:
    from gateway.objects import render_record, render_sum
    from pomelo.gen.v1.account_service_pb2 import UsageRecord

    print_array(
        (render_record(row) if isinstance(row, UsageRecord) else render_sum(row))
        for page in pages
        for row in page
    )


def _print_csv(pages: Iterator[list[dict[str, Any]]]) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, rows in enumerate(pages):
        if rows and not number:
            writer.writerow(rows[0])
        writer.writerows([csv_cell(value) for value in row.values()] for row in rows)
