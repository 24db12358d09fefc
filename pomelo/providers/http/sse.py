"""Parsers of streams: server-sent events, and lines with a JSON object or other text each, such as NDJSON."""

from __future__ import annotations

from pomelo.providers.errors import UpstreamError

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""The largest line, and the largest data of an event: some hosts send a whole response as one event."""

SseEvent = tuple[str, bytes]
"""An event: its name, "" without one, and its data, the lines joined by a line feed."""


class SseParser:
    """Splits a byte stream into events, whatever the boundaries of its packets.

    It works on bytes: a line end is never inside a UTF-8 sequence, so packets may split a character, and the
    reader of an event's data checks that it is UTF-8. Lines may end with LF, CRLF or CR. Comments, ids, retry
    times and unknown fields are skipped. A line that begins like a JSON object is an event, because some
    vendors send an error so, in place of a stream or within it.
    """

    __slots__ = ("_after_cr", "_data", "_idle", "_line", "_name", "_started")

    def __init__(self) -> None:
        self._line = bytearray()  # an incomplete line
        self._data = bytearray()  # the data lines of an incomplete event, each with a line feed
        self._name = ""
        self._after_cr = False  # the last byte was a CR: a line feed that follows belongs to it
        self._started = False
        self._idle = False  # nothing is pending: an event begins

    def feed(self, packet: bytes) -> list[SseEvent]:
        """Return the events that `packet` completes, in order; often none or one.

        Raises:
            UpstreamError: provider_failed; a line or an event is larger than MAX_EVENT_BYTES.
        """
        last = packet.rfind(b"\n\n") + 2
        if last == 1 or self._after_cr or b"\r" in packet or len(packet) > MAX_EVENT_BYTES:
            return self._parse_lines(packet)
        if (
            self._idle
            and last == len(packet)
            and packet.startswith(b"data: ")
            and packet.find(b"\n", 6) == last - 2
        ):
            return [("", packet[6:-2])]
        first = 0
        events: list[SseEvent] = []
        if not self._idle:
            first = packet.find(b"\n\n") + 2
            events = self._parse_lines(packet[:first])
        if first < last:
            events += self._parse_blocks(packet[first:last])
        if last < len(packet):
            events += self._parse_lines(packet[last:])
        return events

    def end(self) -> list[SseEvent]:
        """Return the event that lacks only its empty line, or its last line end, after the stream has ended;
        often none. The standard drops it, but some vendors omit what follows their end marker.

        Raises:
            UpstreamError: provider_failed; the event is larger than MAX_EVENT_BYTES.
        """
        self._after_cr = False
        return [] if self._idle else self._parse_lines(b"\n\n")

    def _parse_blocks(self, packet: bytes) -> list[SseEvent]:
        """Parse the events of a packet that begins and ends at an event's bounds; usual ones are cut out."""
        blocks = packet.split(b"\n\n")
        blocks.pop()
        events: list[SseEvent] = []
        for block in blocks:
            name, line_end, line = block.partition(b"\n")
            if not line_end and name.startswith(b"data: "):
                events.append(("", block[6:]))
            elif name.startswith(b"event: ") and line.startswith(b"data: ") and b"\n" not in line:
                events.append((name[7:].decode("utf-8", "replace"), line[6:]))
            else:
                events += self._parse_lines(block + b"\n\n")
        return events

    def _parse_lines(self, packet: bytes) -> list[SseEvent]:
        if self._after_cr and packet:
            packet = packet.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in packet:
            self._after_cr = packet.endswith(b"\r")
            packet = packet.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in packet:
            self._line += packet
            _check(len(self._line), "an event")
            self._idle = False
            return []
        lines = packet.split(b"\n")
        if self._line:
            lines[0] = bytes(self._line) + lines[0]
        self._line = bytearray(lines.pop())
        _check(len(self._line), "an event")
        events: list[SseEvent] = []
        for line in lines:
            _check(len(line), "an event")
            if not self._started:
                self._started = True
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.startswith(b"{") and not self._data:
                events.append((self._name, line))
            elif line:
                self._field(line)
            else:
                if self._data:
                    self._data.pop()
                    events.append((self._name, bytes(self._data)))
                    self._data.clear()
                self._name = ""
        self._idle = not (self._line or self._data or self._name or self._after_cr)
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data += value.removeprefix(b" ")
            self._data += b"\n"
            _check(len(self._data), "an event")
        elif name == b"event":
            self._name = value.removeprefix(b" ").decode("utf-8", "replace")


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
        _check(len(self._line), "a line")
        return events

    def end(self) -> list[SseEvent]:
        """Return the line that lacks only its line end; none if it is empty. Raises as `feed`."""
        line = bytes(self._line).strip()
        self._line.clear()
        _check(len(line), "a line")
        return [("", line)] if line else []


def _check(size: int, what: str) -> None:
    if size > MAX_EVENT_BYTES:
        raise UpstreamError(
            "provider_failed",
            f"The provider sent {what} that is too large. Retry",
            reason=f"{what} above the limit",
        )
