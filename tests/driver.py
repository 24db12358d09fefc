"""What the drivers of gRPC and REST have in common: a task, and an Outcome into which both read their answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

PROTOCOLS = ("grpc", "rest", "remote")
"""gRPC, REST in the engine's process, and REST through a gateway that reaches the engine over gRPC."""

PROTOCOL = pytest.mark.parametrize("protocol", PROTOCOLS)
REST_PROTOCOL = pytest.mark.parametrize("protocol", PROTOCOLS[1:])
METHOD = pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
PROTOCOL_AND_STREAM = pytest.mark.parametrize(
    ("protocol", "stream"), [(protocol, stream) for protocol in PROTOCOLS for stream in (False, True)]
)


@dataclass
class TaskRequest:
    """A task, independent of the protocol. `body` is the REST body without `stream`; `timeout` is in seconds;
    `form` sends REST's body as a multipart form."""

    body: Mapping[str, Any]
    key: str | None
    stream: bool = False
    request_id: str | None = None
    timeout: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    form: bool = False


@dataclass
class Outcome:
    """The result of a task, or its error. Names of headers are in lower case."""

    code: str = "ok"
    message: str = ""
    status: int = 200
    """REST's status."""
    grpc_status: str = "OK"
    retry_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    id: str = ""
    output: dict[str, Any] = field(default_factory=dict)
    """The output, equal for all protocols; digests stand for bytes."""
    done: bool = False
    """Whether it was a stream that was complete."""
    links: tuple[str, ...] = ()
    adjustments: tuple[str, ...] = ()
    """The adjustments of a gRPC message, in the form of REST's header."""

    @property
    def metadata(self) -> dict[str, str]:
        """The headers and the trailers."""
        return self.headers | self.trailers

    @property
    def content(self) -> str:
        """The text, or the digest of the media; empty without output."""
        return next((self.output[n] for n in ("audio", "linked", "inline", "text") if n in self.output), "")

    @property
    def usage(self) -> tuple[int, ...]:
        """The prompt, completion and total tokens; empty if none were reported."""
        return tuple(self.output.get("usage", ()))


def add_call_piece(outcome: Outcome, index: int, call_id: str, name: str, arguments: str) -> None:
    """Adds a piece of a tool call to the output, which has its id, name and arguments."""
    calls = outcome.output.setdefault("calls", [])
    if index == len(calls):
        assert call_id
        assert name
        calls.append([call_id, name, ""])
    else:
        assert not call_id
        assert not name
    calls[index][2] += arguments


def digest(data: bytes) -> str:
    """Returns the length of the data and a part of its SHA-256; empty for no data."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}" if data else ""


def add_link(outcome: Outcome, url: str, data: bytes, content_type: str) -> None:
    outcome.links = (url,)
    outcome.output |= {"linked": digest(data), "type": content_type}
    assert outcome.output.get("inline", digest(data)) == digest(data), (
        "the link and the bytes are the same media"
    )
