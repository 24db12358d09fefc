"""The download of media in the OpenAPI description."""

from __future__ import annotations

from gateway.openapi.schema import (
    COMMON_ERRORS,
    JSON,
    Models,
    Schema,
    Section,
    headers,
    operation,
    parameter,
    ref,
    responses,
)

_FILE = {
    media_type: {"schema": {"type": "string", "format": "binary"}}
    for media_type in ("application/octet-stream", "image/*", "audio/*")
}


def section(models: Models) -> Section:
    described = operation(
        "getMedia",
        "Download an image or audio file by its signed link.",
        responses(_FILE, *COMMON_ERRORS, "not_found", "deadline_exceeded", "provider_unavailable") | _PARTIAL,
        parameter(
            "media_id", "path", {"type": "string"}, required=True, examples={"id": {"value": "media_01.png"}}
        ),
        parameter("exp", "query", {"type": "string"}, "When the link expires, in Unix seconds."),
        parameter("sig", "query", {"type": "string"}, "The signature of the link."),
        description="A link in a result has all parameters, and needs no key until it expires.",
    )
    described["get"]["security"] = [{}, {"key": []}]
    return Section("Media", "Files in results.", {"/media/{media_id}": described}, {})


_PARTIAL: Schema = {
    "206": {"description": "The part that Range asked for.", "headers": headers(), "content": _FILE},
    "304": {"description": "The caller has the file: If-None-Match has its ETag."},
    "416": {
        "description": "No byte of the file is in Range.",
        "content": {JSON: {"schema": ref("Error")}},
    },
}
