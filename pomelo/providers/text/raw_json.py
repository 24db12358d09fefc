"""JSON texts of callers, such as schemas, within the JSON of a request: unchanged, and not parsed again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import to_json

from pomelo.gen.v1.text_pb2 import JsonSchema, Tool


def with_member(value: Mapping[str, Any] | bytes, name: str, member: str | bytes) -> bytes:
    """Return an object with one more member, as JSON without white space. `member` is JSON; so is `value` if
    it is bytes."""
    encoded = value if isinstance(value, bytes) else to_json(value)
    raw = member if isinstance(member, bytes) else member.encode()
    comma = b"" if encoded == b"{}" else b","
    return b'%b%b"%b":%b}' % (encoded[:-1], comma, name.encode(), raw)


def declaration(given: Tool | JsonSchema) -> dict[str, Any]:
    """Return the name of a tool or a schema, and its `description` and `strict` if they are set."""
    declared: dict[str, Any] = {"name": given.name}
    if given.description:
        declared["description"] = given.description
    if given.HasField("strict"):
        declared["strict"] = given.strict
    return declared


def array(items: Iterable[bytes]) -> bytes:
    """Return a list of JSON values, as JSON."""
    return b"[%b]" % b",".join(items)
