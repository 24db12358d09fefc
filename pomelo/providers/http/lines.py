"""A parser of streams that have one JSON object, or other text, on each line, such as NDJSON."""

from __future__ import annotations

from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.sse import MAX_EVENT_BYTES, SseEvent


class LineParser:
    """Splits a byte stream into lines, whatever the boundaries of its packets. Lines end with LF or CRLF;
    empty ones are skipped. Each is an event without a name, so that it is read as server-sent events are."""

    __slots__ = ("_line",)

    def __init__(self) -> None:
        self._line = bytearray()  # an incomplete line

    def feed(self, packet: bytes) -> list[SseEvent]:
        """Return the lines that `packet` completes, in order; often none or one.

        Raises:
            UpstreamError: provider_failed; a line is larger than MAX_EVENT_BYTES.
        """
        first, *lines = packet.split(b"\n")
        self._line += first
        events: list[SseEvent] = []
        for line in lines:
            events += self.end()
            self._line += line
        if len(self._line) > MAX_EVENT_BYTES:
            raise _too_large()
        return events

    def end(self) -> list[SseEvent]:
        """Return the line that lacks only its line end; none if it is empty. Raises as `feed`."""
        line = bytes(self._line).strip()
        self._line.clear()
        if len(line) > MAX_EVENT_BYTES:
            raise _too_large()
        return [("", line)] if line else []


def _too_large() -> UpstreamError:
    return UpstreamError(
        "provider_failed",
        "The provider sent a line that is too large. Retry",
        reason="a line above the limit",
    )
