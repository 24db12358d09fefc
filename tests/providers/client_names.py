"""Names that a vendor's own client has for fields of its API."""

from __future__ import annotations

from typing import Any


def client_names(vendor: str, body: dict[str, Any]) -> dict[str, Any]:
    """A copy of a body, with the names that the vendor's client has: Mistral's has another for the field `schema`
    of an output format."""
    output_format = body.get("response_format", {})
    if vendor != "mistral" or "json_schema" not in output_format:
        return dict(body)
    schema = dict(output_format["json_schema"])
    schema["schema_definition"] = schema.pop("schema")
    return body | {"response_format": output_format | {"json_schema": schema}}
