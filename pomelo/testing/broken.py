"""Good answers, broken: what `pomelo.testing.faults` makes its table of. No vendor is known here.

Most of it takes a good answer's script and gives one that goes wrong at a place of it, so that a vendor need
not say anything for it to be played.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from pomelo.testing.reply import Gate, Received, Reply, Script, Step, Stop, Token, Wire

BODY = "canary-body <b>of the vendor's</b>"
"""What error bodies say beside the caller's key and prompt; nothing of it may get out."""

ASTRAY = "/led-astray"
"""A path of the server where nobody has any business."""

Breaking = Callable[[Wire, Script], Script]
"""Makes a script that goes wrong of a wire and its script of a good answer."""

_DRIPS = 4000
_DRIP_WAIT = 0.02
_BOMB = 64 * 1024 * 1024
_PIECE = b"x" * (1024 * 1024)
_PIECES = 72
_FLOOD = 1024
_HEAD = b"HTTP/1.1 200 OK\r\n"


def astray(received: Received) -> str:
    """A link that leads to this machine, by another name than the one that was asked."""
    port = received.headers["Host"].rpartition(":")[2]
    return f"http://localhost:{port}{ASTRAY}"


def instead(make: Callable[[Received], Reply]) -> Breaking:
    """Another reply in place of the good one."""
    return lambda wire, good: make


def ahead(*steps: Step) -> Breaking:
    """Steps ahead of the head of a good answer."""
    return _changed(lambda reply: replace(reply, before=steps))


def first(*steps: Step) -> Breaking:
    """Steps between the head and the body of a good answer, whose body comes after them."""
    return _changed(lambda reply: replace(reply, steps=(*steps, *reply.steps)))


def half_way(*steps: Step) -> Breaking:
    """Steps in the middle of the body of a good answer, the rest of which does not come."""
    return _changed(lambda reply: replace(reply, steps=(*halves(reply.steps)[0], *steps)))


def held(gate: Gate) -> Breaking:
    """A good answer that waits at a gate half way through its body."""

    def change(reply: Reply) -> Reply:
        begun, rest = halves(reply.steps)
        return replace(reply, steps=(*begun, gate, *rest))

    return _changed(change)


def body(data: Callable[[bool], bytes]) -> Breaking:
    """The head of a good answer, and another body; `data` is told whether it is one of events."""

    def change(reply: Reply) -> Reply:
        return replace(reply, steps=(data(_has_events(reply)),))

    return _changed(change)


def status(code: int, **headers: str) -> Breaking:
    """The vendor's refusal, which repeats what nobody may hear of."""

    def breaks(wire: Wire, good: Script) -> Script:
        def refuse(received: Received) -> Reply:
            key = " ".join(value for value in received.headers.values() if "key" in value)
            reply = wire.refusal(code, f"{BODY} {key} {received.prompt}")
            return replace(reply, headers={**reply.headers, **_dashed(headers)})

        return refuse

    return breaks


def raw(*packets: bytes) -> Breaking:
    """Packets in place of an answer, and the end of the connection."""
    return instead(lambda received: Reply(before=(*packets, Stop.CLOSE)))


def dripping() -> Breaking:
    """A good answer whose second half never stops to come, a byte at a time, and means nothing."""

    def change(reply: Reply) -> Reply:
        drop = b":\n" if _has_events(reply) else b" "
        return replace(reply, steps=(*halves(reply.steps)[0], *_drips(drop)))

    return _changed(change)


def dripping_head(packet: bytes, beginning: bytes = b"") -> Breaking:
    """A head that never ends: packet after packet."""
    return instead(lambda received: Reply(before=(beginning, *_drips(packet))))


def half_character() -> Breaking:
    """A good answer, the first text of which is cut within a character: no UTF-8, in otherwise sound JSON."""

    def change(reply: Reply) -> Reply:
        data = b"".join(step for step in reply.steps if isinstance(step, bytes))
        return replace(reply, headers=_unmeasured(reply), steps=(data.replace(b'": "', b'": "caf\xc3', 1),))

    return _changed(change)


def unfinished_event() -> Breaking:
    """A good answer whose last event lacks its line ends."""

    def change(reply: Reply) -> Reply:
        data = b"".join(step for step in reply.steps if isinstance(step, bytes))
        return replace(reply, headers=_unmeasured(reply), steps=(data.rstrip(b"\n"),))

    return _changed(change)


def broken_json() -> Breaking:
    """JSON that ends within a text, in a body or an event that ends in good order."""
    return body(lambda events: b'data: {"id": "\n\n' if events else b'{"id": "')


def page(code: int = 200) -> Breaking:
    """What a proxy in between answers: a page for people."""
    html = f"<!doctype html><title>Welcome</title><p>Sign in. {BODY}\n\n".encode()
    head = {"Content-Type": "text/html; charset=utf-8"}
    return instead(lambda received: Reply(code, head, (html,)))


def redirect() -> Breaking:
    """Sends the client elsewhere."""
    return instead(lambda received: Reply(307, {"Location": astray(received)}))


def oversize() -> Breaking:
    """More JSON than anyone would take."""
    steps = (b'{"id": "', *(_PIECE,) * _PIECES, b'"}')
    return instead(lambda received: Reply(headers={"Content-Type": "application/json"}, steps=steps))


def huge_line(size: int = 1_000_000) -> Breaking:
    """A body, or an event of it, in one line."""
    return body(lambda events: (b"data: " if events else b"") + b"x" * size + b"\n\n")


def bomb() -> Breaking:
    """A small body that would be a huge one if it were unpacked, and nobody asked for a packed one."""

    def change(reply: Reply) -> Reply:
        headers = {**_unmeasured(reply), "Content-Encoding": "gzip"}
        return replace(reply, headers=headers, steps=(_bomb(),))

    return _changed(change)


def many_headers(number: int = 100_000) -> Breaking:
    """A head of very many lines."""
    return raw(_HEAD, b"X-Filler: x\r\n" * number, b"Content-Length: 2\r\n\r\n{}")


def huge_header(size: int = 1024 * 1024) -> Breaking:
    """A head with one very long line."""
    return raw(_HEAD, b"X-Filler: " + b"x" * size + b"\r\nContent-Length: 2\r\n\r\n{}")


def one_too_many() -> Breaking:
    """A good answer and, a moment later on the same connection, another one that nobody asked for."""

    def change(reply: Reply) -> Reply:
        data = b"".join(step for step in reply.steps if isinstance(step, bytes))
        answer = _head({**_unmeasured(reply), "Content-Length": str(len(data))}) + data
        unasked = json.dumps({"id": BODY}).encode()
        return replace(
            reply, headers={"Content-Type": "application/json"}, before=(answer, _DRIP_WAIT), steps=(unasked,)
        )

    return _changed(change)


def late_chunk(chunks: int = 3000) -> Breaking:
    """A good answer that goes on and on in small chunks, of which the last is none: what was read ahead of it
    is more than a client takes at once."""

    def change(reply: Reply) -> Reply:
        filler = (b":" if _has_events(reply) else b" ") * 99 + b"\n"
        data = b"".join(step for step in halves(reply.steps)[0] if isinstance(step, bytes))
        packets = [packet for packet in (data, *(filler,) * chunks) if packet]
        body = b"".join(b"%x\r\n%s\r\n" % (len(packet), packet) for packet in packets)
        headers = {**_unmeasured(reply), "Transfer-Encoding": "chunked"}
        return replace(reply, before=(_head(headers) + body + b"no chunk\r\n", Stop.SILENCE), steps=())

    return _changed(change)


def flooding() -> Breaking:
    """A good answer, but that its last packet comes again and again, as fast as it can."""

    def change(reply: Reply) -> Reply:
        packet = next((step for step in reversed(reply.steps) if isinstance(step, bytes)), b"x")
        flood = packet * (len(_PIECE) // len(packet) + 1)
        return replace(reply, headers=_unmeasured(reply), steps=(*reply.steps, *(flood,) * _FLOOD))

    return _changed(change)


def unended(good: Script) -> Script:
    """A good answer that is complete, and whose end does not come."""

    def script(received: Received) -> Reply:
        reply = good if isinstance(good, Reply) else good(received)
        return replace(reply, steps=(*reply.steps, Stop.SILENCE))

    return script


def error_without_body(code: int) -> Breaking:
    """A refusal that begins and is never told."""
    return instead(lambda received: Reply(code, steps=(b'{"error": ', Stop.SILENCE)))


def halves(steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The steps of a body, parted in its middle: between two packets, else within the only one."""
    packets = [place for place, step in enumerate(steps) if isinstance(step, bytes)]
    if len(packets) > 1:
        middle = packets[len(packets) // 2]
        return steps[:middle], steps[middle:]
    if not packets:
        return steps, ()
    (place,) = packets
    packet = steps[place]
    assert isinstance(packet, bytes)
    half = len(packet) // 2
    return (*steps[:place], Token(packet[:half])), (packet[half:], *steps[place + 1 :])


def _changed(change: Callable[[Reply], Reply]) -> Breaking:
    def breaks(wire: Wire, good: Script) -> Script:
        def script(received: Received) -> Reply:
            return change(good if isinstance(good, Reply) else good(received))

        return script

    return breaks


def _has_events(reply: Reply) -> bool:
    return reply.headers.get("Content-Type", "").startswith("text/event-stream")


def _unmeasured(reply: Reply) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name != "Content-Length"}


def _head(headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return _HEAD + lines.encode() + b"\r\n"


def _drips(packet: bytes) -> tuple[Step, ...]:
    return (packet, _DRIP_WAIT) * _DRIPS


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(_BOMB), compresslevel=1)
