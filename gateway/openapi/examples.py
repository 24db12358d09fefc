"""The values that examples share, small enough to be read."""

from __future__ import annotations

from gateway.openapi.schema import Schema
from pomelo.errors import PomeloError

IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP438AAAAQBAYD718vxAAAAAElFTkSu"
    "QmCC"
)
"""An image of one orange pixel."""

AUDIO = "UklGRjQAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YRAAAACAgICAgICAgICAgICAgICA"
"""Two milliseconds of silence as a WAV file."""


def error_example(code: str) -> Schema:
    """Returns the body of an error with the message that it has by default."""
    error = PomeloError(code)
    body = {"message": error.message, "type": error.row.type, "code": code}
    return {"summary": code, "value": {"error": body}}
