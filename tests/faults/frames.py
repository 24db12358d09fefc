"""HTTP/2 frames built by hand, to send what no client library would."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

ACK = END_STREAM = 0x1
END_HEADERS = 0x4

Headers = list[tuple[str, str]]


def frame(frame_type: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(payload))[1:] + bytes((frame_type, flags)) + struct.pack(">I", stream) + payload
    )


def block(headers: Headers) -> bytes:
    """A header block of literal fields without indexing. Names and values have at most 126 bytes."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


def _string(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


def request(path: str, *more: tuple[str, str]) -> Headers:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]


def hello() -> bytes:
    """The client's connection preface and SETTINGS frames."""
    return PREFACE + frame(SETTINGS) + frame(SETTINGS, ACK)


def wide_hello() -> bytes:
    window = 2**31 - 1
    settings = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window))
    return PREFACE + settings + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", window - 65_535))


def headers(stream: int, path: str, *more: tuple[str, str], flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream, block(request(path, *more)))


def message(stream: int, payload: bytes, *, end: bool = True) -> bytes:
    return frame(DATA, END_STREAM if end else 0, stream, struct.pack(">BI", 0, len(payload)) + payload)
