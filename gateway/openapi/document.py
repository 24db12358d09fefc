"""The OpenAPI 3.1 description of the REST API, served as /openapi.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic_core import to_json

from gateway.openapi import account, media, models, openai, tasks
from gateway.openapi.schema import RESPONSE_HEADERS, KnownModel, Models, Schema, Section, closed
from pomelo.errors import TABLE, PomeloError

SECTIONS: Sequence[Callable[[Models], Section]] = (
    tasks.section,
    models.section,
    account.section,
    media.section,
    openai.section,
)
"""The parts of the description, in the order in which pages show them. Each is called with the models by
name, and has its own tag; operations of another API are another part."""

_MAX_MADE = 8
"""Descriptions that are kept: keys may use different models."""

_DESCRIPTION = """\
Text, images and speech by one API. Every request needs a key: `Authorization: Bearer YOUR_API_KEY`. \
A key that begins with `pml_test_` spends test credits and never reaches a provider; try everything with it.

Every error is `{"error": {"message", "type", "code"}}`, and its message says what to do. After 429 and 503, \
wait as many seconds as `Retry-After` says.
"""


def document(public_url: str, models: Models | None = None) -> Schema:
    """Returns the OpenAPI description. `public_url` is the URL of its server, empty if unknown; `models` are
    the models by name, None if they are unknown."""
    paths: Schema = {}
    schemas: Schema = {}
    tags = []
    for make_section in SECTIONS:
        section = make_section(models or {})
        tags.append({"name": section.tag, "description": section.description})
        schemas |= section.schemas
        for path, operations in section.paths.items():
            paths[path] = {
                method: {"tags": [section.tag], **described} for method, described in operations.items()
            }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pomelo", "version": "1", "description": _DESCRIPTION},
        "servers": [{"url": public_url or "/"}],
        "security": [{"key": []}],
        "tags": tags,
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key, such as `pml_test_…`."}
            },
            "headers": dict(RESPONSE_HEADERS),
            "examples": {code: _error_example(code) for code in tasks.CODES},
            "schemas": {**schemas, "Error": _error()},
        },
    }


def _error() -> Schema:
    error = {
        "message": {"type": "string", "description": "What is wrong, with which field, and what to do."},
        "type": {"enum": sorted({row.type for row in TABLE.values()})},
        "code": {"enum": list(tasks.CODES)},
    }
    return closed({"error": closed(error)})


def _error_example(code: str) -> Schema:
    """Returns the body of an error with the message that it has by default."""
    error = PomeloError(code)
    body = {"message": error.message, "type": error.row.type, "code": code}
    return {"summary": code, "value": {"error": body}}


class Description:
    """The OpenAPI description as JSON. `models` returns the models that everyone may know."""

    def __init__(self, public_url: str, models: Callable[[], Models]) -> None:
        self._public_url = public_url
        self._models = models
        self._made: dict[frozenset[tuple[str, KnownModel]], bytes] = {}
        """The latest ones, by their models."""

    def to_json(self, more: Models) -> bytes:
        """Returns the description with `more` models, those that a key may use."""
        models = {**self._models(), **more}
        key = frozenset(models.items())
        made = self._made.get(key)
        if made is None:
            if len(self._made) >= _MAX_MADE:
                del self._made[next(iter(self._made))]
            made = self._made[key] = to_json(document(self._public_url, models))
        return made
