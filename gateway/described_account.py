"""The account and its usage, as the OpenAPI description tells of them.

Part of `gateway.openapi`.
"""

from __future__ import annotations

from typing import Any

from gateway.schema import ANY, JSON, Schema, object_of, ref, responses

_COUNT: Schema = {"type": "integer", "minimum": 0}
_COST: Schema = {"type": "number", "minimum": 0, "description": "Credits, with at most 6 places."}
_LIMIT: Schema = {"type": ["integer", "null"], "minimum": 1, "description": "Null: no limit."}
_SECONDS: Schema = {"type": "number", "minimum": 0}
_USED: dict[str, Schema] = {
    "input_tokens": _COUNT,
    "prompt_tokens_details": ref("PromptTokensDetails"),
    "output_tokens": _COUNT,
    "characters": _COUNT,
    "images": _COUNT,
    "audio_seconds": _SECONDS,
    "output_bytes": _COUNT,
}
_PAGE: Schema = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
_WHEN = {"anyOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]}


def schemas() -> dict[str, Schema]:
    """The objects that are answered."""
    kinds = ["text", "image", "text-to-speech", "speech-to-speech", "speech-to-text", "unknown"]
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
        "type": {"enum": kinds},
        "provider": text,
        "provider_model": text,
        **_USED,
        "processing_ms": _COUNT,
        "first_byte_ms": _COUNT,
        "source": {"enum": ["provider", "estimated", "recovered", "unknown"]},
        "complete": {"type": "boolean"},
        "price_version": text,
        "provider_cost": {
            "type": "number",
            "minimum": 0,
            "description": "US dollars that the provider reported, where the task is billed by that; else 0.",
        },
        "cost": _COST,
    }
    total: Schema = {
        "object": {"const": "usage.total"},
        "group": {"type": "string", "description": "The model, the key's id, or the day (UTC)."},
        "tasks": _COUNT,
        **_USED,
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
    """The operations."""
    return {
        "/api/v1/account": {
            "get": {
                "operationId": "getAccount",
                "summary": "The plan, limits and credits of the key's account.",
                "responses": responses({JSON: {"schema": ref("Account")}}, *ANY, "model_not_allowed"),
            }
        },
        "/api/v1/usage": {
            "get": {
                "operationId": "listUsage",
                "summary": "What was used, newest first; with group_by, sums of it.",
                "parameters": [
                    _parameter(
                        "page_size",
                        {"type": "integer", "minimum": 1, "maximum": 1000},
                        "Absent: 100 records, or 10,000 sums.",
                    ),
                    _parameter("page_token", {"type": "string"}, "next_page_token of the page before."),
                    _parameter("from", _WHEN, "Tasks that ended then or later."),
                    _parameter("to", _WHEN, "Tasks that ended before."),
                    _parameter("model", {"type": "string"}),
                    _parameter("key_id", {"type": "string"}),
                    _parameter("group_by", {"type": "string", "enum": ["model", "key", "day"]}),
                ],
                "responses": responses({JSON: {"schema": ref("UsageList")}}, *ANY),
            }
        },
    }


def _parameter(name: str, schema: Schema, description: str = "") -> dict[str, Any]:
    told = {"description": description} if description else {}
    return {"name": name, "in": "query", "schema": schema, **told}
