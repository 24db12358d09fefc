"""The JSON objects of models, accounts and usage: REST responds with them, and the command line prints them.

Amounts are formatted as exact decimals of credits: a float would not be exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic_core import to_json

from gateway.types import type_name
from gateway.types.text.results import cached_counts
from pomelo import money
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.model_service_pb2 import Model, PriceUnit
from pomelo.gen.v1.usage_pb2 import Mode, Usage
from pomelo.protobuf.enums import enum_names

_MODES = enum_names(Mode.DESCRIPTOR)
_SOURCES = enum_names(pb.UsageSource.DESCRIPTOR)
_UNITS = enum_names(PriceUnit.DESCRIPTOR)


# --- models


def render_model(model: Model) -> dict[str, Any]:
    """Returns a model as a JSON object, with prices in credits as decimal text."""
    limits = {f.name: value for f, value in model.limits.ListFields()}
    members = {
        "id": model.id,
        "object": "model",
        "type": type_name(model.task_type),
        "limits": limits,
        "price": _prices(model.prices),
        "price_version": model.price_version,
        "available": model.available,
        "deprecated": _date(model.deprecate_time),
        "retires": _date(model.retire_time),
    }
    if model.price_tiers:
        members["price_tiers"] = [
            {"from_input_tokens": tier.min_input_tokens, "price": _prices(tier.prices)}
            for tier in model.price_tiers
        ]
    return members


def _prices(lines: Any) -> dict[str, str]:
    return {
        _UNITS.get(price.unit, f"unit_{price.unit}"): money.format_credits(price.amount_micros)
        for price in lines
    }


def _date(time: Timestamp) -> str | None:
    return time.ToDatetime().date().isoformat() if time.seconds else None


# --- accounts and usage


def render_account(account: pb.Account) -> bytes:
    fields = {
        "id": account.id,
        "object": "account",
        "mode": mode_name(account.mode),
        "plan": account.plan,
        "limits": render_limits(account.limits),
    }
    return to_json(fields)[:-1] + b',"credits":' + render_balance(account.balance) + b"}"


def render_limits(limits: pb.PlanLimits) -> dict[str, Any]:
    given = {field.name: value for field, value in limits.ListFields()}
    return {
        "requests_per_minute": given.get("requests_per_minute"),
        "concurrent_requests": given.get("concurrent_requests"),
        "tokens_per_minute": given.get("tokens_per_minute"),
        "models": list(limits.models.models) if limits.HasField("models") else None,
    }


def render_balance(balance: pb.Balance) -> bytes:
    amounts = _amounts(
        granted=balance.granted_micros,
        spent=balance.spent_micros,
        held=balance.held_micros,
        available=balance.available_micros,
        **({"credit_limit": balance.credit_limit_micros} if balance.credit_limit_micros else {}),
    )
    return b"{" + amounts + b"}"


def render_records(page: pb.ListUsageResponse) -> bytes:
    return _render_list(map(render_record, page.records), page.next_page_token)


def render_sums(page: pb.SumUsageResponse) -> bytes:
    return _render_list(map(render_sum, page.sums), page.next_page_token)


def _render_list(rows: Iterable[bytes], next_page_token: str) -> bytes:
    return (
        b'{"object":"list","data":['
        + b",".join(rows)
        + b'],"next_page_token":'
        + to_json(next_page_token or None)
        + b"}"
    )


def render_record(row: pb.UsageRecord) -> bytes:
    fields = {
        "id": row.id,
        "object": "usage.record",
        "time": row.end_time.seconds,
        "request_id": row.request_id,
        "account": row.account_id,
        "key_id": row.key_id,
        "mode": mode_name(row.mode),
        "wire": row.protocol,
        "model": row.model,
        "type": type_name(row.task_type),
        "provider": row.provider,
        "provider_model": row.provider_model,
        "user": row.user or None,
        "metadata": dict(row.metadata),
        **_counts(row.usage),
        "output_bytes": row.output_bytes,
        "processing_ms": row.processing_ms,
        "first_byte_ms": row.first_byte_ms,
        "source": _SOURCES.get(row.source, "unknown"),
        "complete": row.complete,
        "code": row.code or None,
        "price_version": row.price_version,
    }
    return _with_amounts(fields, provider_cost=row.provider_cost_micros, cost=row.cost_micros)


def render_sum(row: pb.UsageSum) -> bytes:
    fields = {
        "object": "usage.total",
        "group": row.groups[0],
        "tasks": row.tasks,
        **_counts(row.usage),
        "output_bytes": row.output_bytes,
    }
    return _with_amounts(fields, cost=row.cost_micros)


def _counts(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "prompt_tokens_details": cached_counts(usage),
        "output_tokens": usage.output_tokens,
        "characters": usage.characters,
        "images": usage.images,
        "audio_seconds": usage.audio_seconds,
    }


def mode_name(mode: Mode.ValueType) -> str:
    """Returns live or test; `unknown` for a mode that is newer than this gateway."""
    return _MODES.get(mode, "unknown")


def _with_amounts(fields: dict[str, Any], **micros: int) -> bytes:
    return to_json(fields)[:-1] + b"," + _amounts(**micros) + b"}"


def _amounts(**micros: int) -> bytes:
    return ",".join([f'"{name}":{money.format_credits(amount)}' for name, amount in micros.items()]).encode()
