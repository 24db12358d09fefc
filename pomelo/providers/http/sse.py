"""Server-sent events, from bytes as they come off the wire to events.

`pomelo.providers.http.client` feeds it what it reads; providers get the events. It knows no vendor and no
HTTP."""

from __future__ import annotations

from pomelo.errors import PomeloError

EVENT_MOST = 256 * 1024
"""Bytes that a line, and the data of an event, may have."""

SseEvent = tuple[str, bytes]
"""An event: its name ("" when it has none) and its data, the lines joined by a line feed."""


class SseParser:
    """Cuts a byte stream into events, however it was cut into packets.

    Works on bytes: a line end is never inside a UTF-8 sequence, so a character that two packets share needs
    no care, and whoever reads an event's data finds out whether it is UTF-8. Lines may end with LF, CRLF or
    CR; comments, ids, retry times and unknown fields are skipped; an event without an empty line behind it
    comes out at the end.
    """

    __slots__ = ("_after_cr", "_begun", "_between", "_data", "_line", "_name", "_size")

    def __init__(self) -> None:
        self._line = bytearray()  # a line whose end hasn't come
        self._data: list[bytes] = []  # the data lines of an event whose end hasn't come
        self._size = 0  # bytes in _data
        self._name = ""
        self._after_cr = False  # the last byte was a CR: a line feed that follows belongs to it
        self._begun = False
        self._between = False  # nothing is pending: a packet may be taken as it is

    def feed(self, packet: bytes) -> list[SseEvent]:
        """The events that `packet` completes, in order; often none or one.

        Raises:
            PomeloError: provider_failed; a line or an event is larger than EVENT_MOST.
        """
        if self._between and packet.endswith(b"\n\n") and b"\r" not in packet and len(packet) <= EVENT_MOST:
            if packet.startswith(b"data: ") and packet.find(b"\n", 6, -2) < 0:
                return [("", packet[6:-2])]
            return self._whole(packet)
        return self._lines(packet)

    def end(self) -> list[SseEvent]:
        """The event that lacks only its empty line, or its last line end, when the stream has ended in good
        order; often none. The standard drops it, but vendors leave out what follows their end marker.

        Raises:
            PomeloError: provider_failed; it is larger than EVENT_MOST.
        """
        self._after_cr = False
        return [] if self._between else self._lines(b"\n\n")

    def _whole(self, packet: bytes) -> list[SseEvent]:
        """Several events, or an unusual one, in a packet that begins and ends where an event does."""
        blocks = packet.split(b"\n\n")
        blocks.pop()
        events: list[SseEvent] = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append(("", block[6:]))
            else:
                events += self._lines(block + b"\n\n")
        return events

    def _lines(self, packet: bytes) -> list[SseEvent]:
        if self._after_cr and packet:
            packet = packet.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in packet:
            self._after_cr = packet.endswith(b"\r")
            packet = packet.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in packet:
            self._line += packet
            self._check(len(self._line))
            self._between = False
            return []
        lines = packet.split(b"\n")
        if self._line:
            lines[0] = bytes(self._line) + lines[0]
        self._line = bytearray(lines.pop())
        self._check(len(self._line))
        events: list[SseEvent] = []
        for line in lines:
            self._check(len(line))
            if not self._begun:
                self._begun = True
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line:
                self._field(line)
            else:
                if self._data:
                    events.append((self._name, b"\n".join(self._data)))
                    self._data = []
                    self._size = 0
                self._name = ""
        self._between = not (self._line or self._data or self._name or self._after_cr)
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._size += len(value) + 1  # also bounds how many empty lines are kept
            self._check(self._size)
            self._data.append(value)
        elif name == b"event":
            self._name = value.removeprefix(b" ").decode("utf-8", "replace")

    def _check(self, size: int) -> None:
        if size > EVENT_MOST:
            raise PomeloError("provider_failed", "The provider sent a piece that is too large. Retry")
