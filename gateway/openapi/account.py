"""The account and usage operations in the OpenAPI description."""

from __future__ import annotations

from gateway.account import DIMENSIONS
from gateway.openapi.schema import (
    COMMON_ERRORS,
    COUNT,
    JSON,
    TEXT,
    Models,
    Schema,
    Section,
    object_of,
    operation,
    parameter,
    ref,
    responses,
)
from gateway.types import TASK_FORMATS

_MODE: Schema = {"enum": ["live", "test"]}
_PAGE_SIZE: Schema = {"type": "integer", "minimum": 1, "maximum": 1000}
_FILTER: Schema = {"type": "string", "minLength": 1}
_COST: Schema = {"type": "number", "minimum": 0, "description": "Credits, with at most 6 places."}
_LIMIT: Schema = {"type": ["integer", "null"], "minimum": 1, "description": "Null: no limit."}
_SECONDS: Schema = {"type": "number", "minimum": 0}
_USAGE: dict[str, Schema] = {
    "input_tokens": COUNT,
    "prompt_tokens_details": ref("PromptTokensDetails"),
    "output_tokens": COUNT,
    "characters": COUNT,
    "images": COUNT,
    "audio_seconds": _SECONDS,
    "output_bytes": COUNT,
}
_DATE_OR_TIME = {"anyOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]}


def section(models: Models) -> Section:
    return Section("Account", "Limits, credits and usage of the key's account.", _paths(), _schemas())


def _schemas() -> dict[str, Schema]:
    task_types = [*(each.name for each in TASK_FORMATS.values()), "unknown"]
    limits = {
        "requests_per_minute": _LIMIT,
        "concurrent_requests": _LIMIT,
        "tokens_per_minute": _LIMIT,
        "models": {"type": ["array", "null"], "items": TEXT, "description": "Null: all."},
    }
    granted: Schema = {"type": "number", "description": "Below 0 only with a credit limit."}
    amounts = {"granted": granted} | dict.fromkeys(("spent", "held", "available"), _COST)
    credit_limit = _COST | {"description": "Of a postpaid account: what it may spend beyond `granted`."}
    record: Schema = {
        "id": TEXT,
        "object": {"const": "usage.record"},
        "time": {"type": "integer", "description": "When the task ended, in Unix seconds."},
        "request_id": TEXT,
        "account": TEXT,
        "key_id": TEXT,
        "mode": _MODE,
        "wire": {"enum": ["grpc", "rest"]},
        "model": TEXT,
        "type": {"enum": task_types},
        "provider": TEXT,
        "provider_model": TEXT,
        "user": {"type": ["string", "null"], "description": "As the caller named it."},
        "metadata": {
            "type": "object",
            "additionalProperties": TEXT,
            "description": "As the caller gave it.",
        },
        **_USAGE,
        "processing_ms": COUNT,
        "first_byte_ms": COUNT,
        "source": {"enum": ["provider", "estimated", "recovered", "unknown"]},
        "complete": {"type": "boolean"},
        "code": {
            "type": ["string", "null"],
            "description": "Why the task failed: the code of its error, or cancelled. Null: it did not fail.",
        },
        "price_version": TEXT,
        "provider_cost": {
            "type": "number",
            "minimum": 0,
            "description": "US dollars that the provider reported, if the task is billed by that; else 0.",
        },
        "cost": _COST,
    }
    total: Schema = {
        "object": {"const": "usage.total"},
        "group": {"type": "string", "description": "The value of group_by; a key by its id, a day in UTC."},
        "tasks": COUNT,
        **_USAGE,
        "cost": _COST,
    }
    account: Schema = {
        "id": TEXT,
        "object": {"const": "account"},
        "mode": _MODE,
        "plan": TEXT,
        "limits": object_of(limits),
        "credits": object_of(amounts | {"credit_limit": credit_limit}, amounts),
    }
    page: Schema = {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"anyOf": [ref("UsageRecord"), ref("UsageTotal")]}},
        "next_page_token": {"type": ["string", "null"], "description": "Null: this was the last page."},
    }
    return {
        "Account": object_of(account),
        "UsageRecord": object_of(record),
        "UsageTotal": object_of(total),
        "UsageList": object_of(page),
    }


def _paths() -> Schema:
    return {
        "/api/v1/account": operation(
            "getAccount",
            "Get the plan, limits and credits of the key's account.",
            responses({JSON: {"schema": ref("Account")}}, *COMMON_ERRORS, "model_not_allowed"),
        ),
        "/api/v1/usage": operation(
            "listUsage",
            "List usage records, newest first; with group_by, totals.",
            responses({JSON: {"schema": ref("UsageList")}}, *COMMON_ERRORS, "deadline_exceeded"),
            parameter("page_size", "query", _PAGE_SIZE, "Absent: 100 records, or up to 10,000 totals."),
            parameter("page_token", "query", TEXT, "next_page_token of the previous page."),
            parameter("from", "query", _DATE_OR_TIME, "Tasks that ended at this time or later."),
            parameter("to", "query", _DATE_OR_TIME, "Tasks that ended before this time. Not before from."),
            parameter("model", "query", _FILTER),
            parameter("key_id", "query", _FILTER),
            parameter(
                "failed", "query", {"type": "boolean"}, "True: only tasks that failed. Else only billed ones."
            ),
            parameter(
                "group_by",
                "query",
                {
                    "type": "string",
                    "anyOf": [
                        {"enum": [*DIMENSIONS]},
                        {"pattern": "^metadata\\..+$"},
                    ],
                },
            ),
        ),
    }
