"""The account and its usage over REST: query parameters in, JSON out.

The routes call the two handlers. Money is rendered by hand as numbers of credits: a float would not be exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic_core import to_json

from gateway.render import TYPES
from gateway.reply import json_reply
from gateway.state import Gateway
from pomelo import money
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.service import Visit

_PAGE = re.compile(r"[0-9]{1,4}")
_MOST = 1_000
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?([Zz]|[+\- ][0-9]{2}:[0-9]{2})"
)
_TIMES = "a date such as 2026-11-24, or a time such as 2026-11-24T12:00:00Z (RFC 3339)"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
_GROUPS = {"model": pb.USAGE_GROUP_MODEL, "key": pb.USAGE_GROUP_KEY, "day": pb.USAGE_GROUP_DAY}
_SOURCES = {
    pb.USAGE_SOURCE_PROVIDER: "provider",
    pb.USAGE_SOURCE_ESTIMATED: "estimated",
    pb.USAGE_SOURCE_RECOVERED: "recovered",
}


async def get_account(gateway: Gateway, request: web.Request, call: Call, visit: Visit) -> web.StreamResponse:
    """The account of the key."""
    try:
        _read(request.query, {})
    except PomeloError as error:
        raise await visit.refuse(error) from None
    return json_reply(call, account(await gateway.services.accounts.get_account(call)))


async def list_usage(gateway: Gateway, request: web.Request, call: Call, visit: Visit) -> web.StreamResponse:
    """A page of usage records, or sums of them."""
    try:
        asked = query(request.query)
    except PomeloError as error:
        raise await visit.refuse(error) from None
    return json_reply(call, usage(await gateway.services.accounts.list_usage(asked, call)))


# --- in


def query(given: Mapping[str, str]) -> pb.ListUsageRequest:
    """What the parameters of a query ask for.

    Raises:
        PomeloError: invalid_parameter.
    """
    return pb.ListUsageRequest(**_read(given, _PARAMETERS))


def _read(given: Mapping[str, str], known: Mapping[str, tuple[str, _Reader]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in given.items():  # of a multidict: each of a name's values
        if name not in known:
            raise _unknown(name, known)
        field, read = known[name]
        if field in values:
            raise invalid(name, "given once")
        values[field] = read(name, text)
    return values


def _unknown(name: str, known: Collection[str]) -> PomeloError:
    shown = name[:100].encode("utf-8", "replace").decode()
    there = f"There are {', '.join(known)}" if known else "There are none here"
    return PomeloError("invalid_parameter", f"Unknown query parameter: {shown}. {there}", field=shown)


_Reader = Callable[[str, str], Any]


def _text(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(name, "text") from None
    return text


def _page_size(name: str, text: str) -> int:
    if not _PAGE.fullmatch(text) or not 1 <= int(text) <= _MOST:
        raise invalid(name, f"1 to {_MOST:,}")
    return int(text)


def _group(name: str, text: str) -> Any:
    if text not in _GROUPS:
        raise invalid(name, "model, key or day")
    return _GROUPS[text]


def _moment(name: str, text: str) -> Timestamp:
    try:
        if _DATE.fullmatch(text):
            moment = datetime.fromisoformat(text + "T00:00:00+00:00")
        else:
            parts = _TIME.fullmatch(text)
            if parts is None:
                raise ValueError(text)
            day, clock, fraction, zone = parts.groups()
            # A plus that was not encoded is a space in a query.
            zone = "+00:00" if zone in ("Z", "z") else zone.replace(" ", "+")
            moment = datetime.fromisoformat(f"{day}T{clock}{(fraction or '')[:7]}{zone}")
        if not _FIRST <= moment <= _LAST:
            raise ValueError(text)
    except ValueError:
        raise invalid(name, _TIMES) from None
    micros = (moment - _EPOCH) // timedelta(microseconds=1)
    return Timestamp(seconds=micros // 1_000_000, nanos=micros % 1_000_000 * 1000)


_PARAMETERS: Mapping[str, tuple[str, _Reader]] = {
    "page_size": ("page_size", _page_size),
    "page_token": ("page_token", _text),
    "from": ("from_time", _moment),
    "to": ("to_time", _moment),
    "model": ("model", _text),
    "key_id": ("key_id", _text),
    "group_by": ("group_by", _group),
}
"""The field that each parameter becomes, and how."""


# --- out


def account(found: pb.Account) -> bytes:
    """An account as JSON."""
    limits = found.limits
    fields = {
        "id": found.name,
        "object": "account",
        "mode": "live" if found.live else "test",
        "plan": found.plan,
        "limits": {
            "requests_per_minute": limits.requests_per_minute or None,
            "concurrent_requests": limits.concurrent_requests or None,
            "tokens_per_minute": limits.tokens_per_minute or None,
            "models": list(limits.models) or None,
        },
    }
    balance = found.balance
    amounts = ",".join(
        f'"{name}":{money.format_credits(micros)}'
        for name, micros in (
            ("granted", balance.granted_micros),
            ("spent", balance.spent_micros),
            ("held", balance.held_micros),
            ("available", balance.available_micros),
        )
    )
    return to_json(fields)[:-1] + b',"credits":{' + amounts.encode() + b"}}"


def usage(found: pb.ListUsageResponse) -> bytes:
    """A page of records, or sums, as JSON."""
    rows = [*map(_record, found.records), *map(_total, found.totals)]
    return (
        b'{"object":"list","data":['
        + b",".join(rows)
        + b'],"next_page_token":'
        + to_json(found.next_page_token or None)
        + b"}"
    )


def _record(row: pb.UsageRecord) -> bytes:
    fields = {
        "id": row.id,
        "object": "usage.record",
        "time": row.time.seconds,
        "request_id": row.request_id,
        "key_id": row.key_id,
        "mode": "live" if row.live else "test",
        "wire": row.wire,
        "model": row.model,
        "type": TYPES.get(row.task_type, "unknown"),
        "provider": row.provider,
        "provider_model": row.provider_model,
        "input_tokens": row.input_tokens,
        "prompt_tokens_details": _details(row),
        "output_tokens": row.output_tokens,
        "characters": row.characters,
        "images": row.images,
        "audio_seconds": row.audio_seconds,
        "output_bytes": row.output_bytes,
        "processing_ms": row.processing_ms,
        "first_byte_ms": row.first_byte_ms,
        "source": _SOURCES.get(row.source, "unknown"),
        "complete": row.complete,
        "price_version": row.price_version,
    }
    return _with_amounts(fields, provider_cost=row.provider_cost_micros, cost=row.cost_micros)


def _total(row: pb.UsageTotal) -> bytes:
    fields = {
        "object": "usage.total",
        "group": row.group,
        "tasks": row.tasks,
        "input_tokens": row.input_tokens,
        "prompt_tokens_details": _details(row),
        "output_tokens": row.output_tokens,
        "characters": row.characters,
        "images": row.images,
        "audio_seconds": row.audio_seconds,
        "output_bytes": row.output_bytes,
    }
    return _with_amounts(fields, cost=row.cost_micros)


def _details(row: pb.UsageRecord | pb.UsageTotal) -> dict[str, int]:
    return {"cached_tokens": row.cached_input_tokens, "cache_write_tokens": row.cache_write_input_tokens}


def _with_amounts(fields: dict[str, Any], **micros: int) -> bytes:
    amounts = "".join([f',"{name}":{money.format_credits(amount)}' for name, amount in micros.items()])
    return to_json(fields)[:-1] + amounts.encode() + b"}"
