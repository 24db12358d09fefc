"""The account and usage operations in the OpenAPI description."""

from __future__ import annotations

from gateway.openapi.schema import COMMON_ERRORS, JSON, Schema, object_of, parameter, ref, responses
from gateway.types import TASK_FORMATS

_COUNT: Schema = {"type": "integer", "minimum": 0}
_COST: Schema = {"type": "number", "minimum": 0, "description": "Credits, with at most 6 places."}
_LIMIT: Schema = {"type": ["integer", "null"], "minimum": 1, "description": "Null: no limit."}
_SECONDS: Schema = {"type": "number", "minimum": 0}
_USAGE: dict[str, Schema] = {
    "input_tokens": _COUNT,
    "prompt_tokens_details": ref("PromptTokensDetails"),
    "output_tokens": _COUNT,
    "characters": _COUNT,
    "images": _COUNT,
    "audio_seconds": _SECONDS,
    "output_bytes": _COUNT,
}
_DATE_OR_TIME = {"anyOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]}


def schemas() -> dict[str, Schema]:
    """Returns the schemas of the objects in responses."""
    task_types = [*(each.name for each in TASK_FORMATS.values()), "unknown"]
    text: Schema = {"type": "string"}
    mode: Schema = {"enum": ["live", "test"]}
    limits = {
        "requests_per_minute": _LIMIT,
        "concurrent_requests": _LIMIT,
        "tokens_per_minute": _LIMIT,
        "models": {"type": ["array", "null"], "items": text, "description": "Null: all."},
    }
    amounts = dict.fromkeys(("granted", "spent", "held", "available"), _COST)
    record: Schema = {
        "id": text,
        "object": {"const": "usage.record"},
        "time": {"type": "integer", "description": "When the task ended, in Unix seconds."},
        "request_id": text,
        "key_id": text,
        "mode": mode,
        "wire": {"enum": ["grpc", "rest"]},
        "model": text,
        "type": {"enum": task_types},
        "provider": text,
        "provider_model": text,
        **_USAGE,
        "processing_ms": _COUNT,
        "first_byte_ms": _COUNT,
        "source": {"enum": ["provider", "estimated", "recovered", "unknown"]},
        "complete": {"type": "boolean"},
        "price_version": text,
        "provider_cost": {
            "type": "number",
            "minimum": 0,
            "description": "US dollars that the provider reported, if the task is billed by that; else 0.",
        },
        "cost": _COST,
    }
    total: Schema = {
        "object": {"const": "usage.total"},
        "group": {"type": "string", "description": "The model, the key's id, or the day (UTC)."},
        "tasks": _COUNT,
        **_USAGE,
        "cost": _COST,
    }
    account: Schema = {
        "id": text,
        "object": {"const": "account"},
        "mode": mode,
        "plan": text,
        "limits": object_of(limits, limits),
        "credits": object_of(amounts, amounts),
    }
    page: Schema = {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"anyOf": [ref("UsageRecord"), ref("UsageTotal")]}},
        "next_page_token": {"type": ["string", "null"], "description": "Null: this was the last page."},
    }
    return {
        "Account": object_of(account, account),
        "UsageRecord": object_of(record, record),
        "UsageTotal": object_of(total, total),
        "UsageList": object_of(page, page),
    }


def paths() -> Schema:
    """Returns the operations by path."""
    return {
        "/api/v1/account": {
            "get": {
                "operationId": "getAccount",
                "summary": "The plan, limits and credits of the key's account.",
                "responses": responses(
                    {JSON: {"schema": ref("Account")}}, *COMMON_ERRORS, "model_not_allowed"
                ),
            }
        },
        "/api/v1/usage": {
            "get": {
                "operationId": "listUsage",
                "summary": "Usage records, newest first; with group_by, totals.",
                "parameters": [
                    parameter(
                        "page_size",
                        "query",
                        {"type": "integer", "minimum": 1, "maximum": 1000},
                        "Absent: 100 records, or 10,000 totals.",
                    ),
                    parameter(
                        "page_token", "query", {"type": "string"}, "next_page_token of the previous page."
                    ),
                    parameter("from", "query", _DATE_OR_TIME, "Tasks that ended at this time or later."),
                    parameter("to", "query", _DATE_OR_TIME, "Tasks that ended before this time."),
                    parameter("model", "query", {"type": "string"}),
                    parameter("key_id", "query", {"type": "string"}),
                    parameter("group_by", "query", {"type": "string", "enum": ["model", "key", "day"]}),
                ],
                "responses": responses({JSON: {"schema": ref("UsageList")}}, *COMMON_ERRORS),
            }
        },
    }
