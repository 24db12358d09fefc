"""Makes scripts of faults from the script of a valid response, for any vendor."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from pomelo.testing.reply import Gate, Received, Reply, Script, Step, Stop, Token, VendorProtocol

BODY = "canary-body <b>of the vendor's</b>"
"""The content of error bodies, beside the caller's key and prompt. Nothing of it may be shown to callers."""

FORBIDDEN_PATH = "/must-not-be-requested"

FaultMaker = Callable[[VendorProtocol, Script], Script]
"""Makes the script of a fault from a protocol and its script of a valid response."""

_DRIPS = 4000
_DRIP_WAIT = 0.02
_BOMB_BYTES = 64 * 1024 * 1024
_MEBIBYTE = b"x" * (1024 * 1024)
_OVERSIZE_MEBIBYTES = 72
_FLOOD_PACKETS = 1024
_HEAD = b"HTTP/1.1 200 OK\r\n"


def forbidden_link(received: Received) -> str:
    """Return a link to the server by another host name than that of the request."""
    port = received.headers["Host"].rpartition(":")[2]
    return f"http://localhost:{port}{FORBIDDEN_PATH}"


def instead(make: Callable[[Received], Reply]) -> FaultMaker:
    """Another reply in place of the valid one."""
    return lambda protocol, valid: make


def before_head(*steps: Step) -> FaultMaker:
    """Steps before the head of a valid response."""
    return _changed(lambda reply: replace(reply, before=steps))


def before_body(*steps: Step) -> FaultMaker:
    """Steps between the head and the body of a valid response."""
    return _changed(lambda reply: replace(reply, steps=(*steps, *reply.steps)))


def half_way(*steps: Step) -> FaultMaker:
    """The first half of the body of a valid response, and then these steps."""
    return _changed(lambda reply: replace(reply, steps=(*halves(reply.steps)[0], *steps)))


def held_half_way(gate: Gate) -> FaultMaker:
    """A valid response that waits at a gate in the middle of its body."""

    def change(reply: Reply) -> Reply:
        start, rest = halves(reply.steps)
        return replace(reply, steps=(*start, gate, *rest))

    return _changed(change)


def body(data: Callable[[bool], bytes]) -> FaultMaker:
    """The head of a valid response with another body; `data` is called with whether it is a stream of
    events."""

    def change(reply: Reply) -> Reply:
        return replace(reply, steps=(data(_has_events(reply)),))

    return _changed(change)


def status(code: int, **headers: str) -> FaultMaker:
    """The vendor's refusal, which repeats the caller's key and prompt."""

    def make(protocol: VendorProtocol, valid: Script) -> Script:
        def refuse(received: Received) -> Reply:
            key = " ".join(value for value in received.headers.values() if "key" in value)
            reply = protocol.refusal(code, f"{BODY} {key} {received.prompt}")
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            return replace(reply, headers={**reply.headers, **names})

        return refuse

    return make


def raw(*packets: bytes) -> FaultMaker:
    """Packets in place of a response, and the end of the connection."""
    return instead(lambda received: Reply(before=(*packets, Stop.CLOSE)))


def dripping() -> FaultMaker:
    """A valid response whose second half arrives a byte at a time, without content."""

    def change(reply: Reply) -> Reply:
        drop = b":\n" if _has_events(reply) else b" "
        return replace(reply, steps=(*halves(reply.steps)[0], *_drips(drop)))

    return _changed(change)


def dripping_head(packet: bytes, beginning: bytes = b"") -> FaultMaker:
    """A head that never ends: `beginning`, and then `packet` again and again."""
    return instead(lambda received: Reply(before=(beginning, *_drips(packet))))


def half_character() -> FaultMaker:
    """A valid response whose first text is cut within a character: it is not UTF-8, in otherwise valid
    JSON."""

    def change(reply: Reply) -> Reply:
        data = b"".join(step for step in reply.steps if isinstance(step, bytes))
        return replace(
            reply, headers=_without_length(reply), steps=(data.replace(b'": "', b'": "caf\xc3', 1),)
        )

    return _changed(change)


def unfinished_event() -> FaultMaker:
    """A valid response whose last event has no line ends."""

    def change(reply: Reply) -> Reply:
        data = b"".join(step for step in reply.steps if isinstance(step, bytes))
        return replace(reply, headers=_without_length(reply), steps=(data.rstrip(b"\n"),))

    return _changed(change)


def broken_json() -> FaultMaker:
    """JSON that ends within a text, in a body or an event that ends correctly."""
    return body(lambda events: b'data: {"id": "\n\n' if events else b'{"id": "')


def page(code: int = 200) -> FaultMaker:
    """An HTML page, as a proxy sends it."""
    html = f"<!doctype html><title>Welcome</title><p>Sign in. {BODY}\n\n".encode()
    head = {"Content-Type": "text/html; charset=utf-8"}
    return instead(lambda received: Reply(code, head, (html,)))


def redirect() -> FaultMaker:
    """A redirect to a forbidden link."""
    return instead(lambda received: Reply(307, {"Location": forbidden_link(received)}))


def oversize() -> FaultMaker:
    """More JSON than a client should read."""
    steps = (b'{"id": "', *(_MEBIBYTE,) * _OVERSIZE_MEBIBYTES, b'"}')
    return instead(lambda received: Reply(headers={"Content-Type": "application/json"}, steps=steps))


def huge_line(size: int = 1_000_000) -> FaultMaker:
    """A body, or an event, in one long line."""
    return body(lambda events: (b"data: " if events else b"") + b"x" * size + b"\n\n")


def bomb() -> FaultMaker:
    """A compressed body that is huge when it is decompressed. The request did not ask for compression."""

    def change(reply: Reply) -> Reply:
        headers = {**_without_length(reply), "Content-Encoding": "gzip"}
        return replace(reply, headers=headers, steps=(_bomb(),))

    return _changed(change)


def many_headers(number: int = 100_000) -> FaultMaker:
    """A head of very many lines."""
    return raw(_HEAD, b"X-Filler: x\r\n" * number, b"Content-Length: 2\r\n\r\n{}")


def huge_header(size: int = 1024 * 1024) -> FaultMaker:
    """A head with one very long line."""
    return raw(_HEAD, b"X-Filler: " + b"x" * size + b"\r\nContent-Length: 2\r\n\r\n{}")


def one_too_many() -> FaultMaker:
    """A valid response and, a moment later on the same connection, one without a request."""

    def change(reply: Reply) -> Reply:
        data = b"".join(step for step in reply.steps if isinstance(step, bytes))
        answer = _head({**_without_length(reply), "Content-Length": str(len(data))}) + data
        unrequested = json.dumps({"id": BODY}).encode()
        return replace(
            reply,
            headers={"Content-Type": "application/json"},
            before=(answer, _DRIP_WAIT),
            steps=(unrequested,),
        )

    return _changed(change)


def late_chunk(chunks: int = 3000) -> FaultMaker:
    """A valid response that continues in many small chunks, and ends with an invalid one after more data than
    a client reads ahead."""

    def change(reply: Reply) -> Reply:
        filler = (b":" if _has_events(reply) else b" ") * 99 + b"\n"
        data = b"".join(step for step in halves(reply.steps)[0] if isinstance(step, bytes))
        packets = [packet for packet in (data, *(filler,) * chunks) if packet]
        body = b"".join(b"%x\r\n%s\r\n" % (len(packet), packet) for packet in packets)
        headers = {**_without_length(reply), "Transfer-Encoding": "chunked"}
        return replace(reply, before=(_head(headers) + body + b"no chunk\r\n", Stop.SILENCE), steps=())

    return _changed(change)


def flooding() -> FaultMaker:
    """A valid response whose last packet is repeated as fast as possible."""

    def change(reply: Reply) -> Reply:
        packet = next((step for step in reversed(reply.steps) if isinstance(step, bytes)), b"x")
        flood = packet * (len(_MEBIBYTE) // len(packet) + 1)
        return replace(
            reply, headers=_without_length(reply), steps=(*reply.steps, *(flood,) * _FLOOD_PACKETS)
        )

    return _changed(change)


def without_end(valid: Script) -> Script:
    """A complete response whose connection stays open."""

    def script(received: Received) -> Reply:
        reply = valid if isinstance(valid, Reply) else valid(received)
        return replace(reply, steps=(*reply.steps, Stop.SILENCE))

    return script


def error_without_body(code: int) -> FaultMaker:
    """A refusal whose body starts and then stalls."""
    return instead(lambda received: Reply(code, steps=(b'{"error": ', Stop.SILENCE)))


def halves(steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Split the steps of a body in its middle: between two packets, or within the only one."""
    packets = [index for index, step in enumerate(steps) if isinstance(step, bytes)]
    if len(packets) > 1:
        middle = packets[len(packets) // 2]
        return steps[:middle], steps[middle:]
    if not packets:
        return steps, ()
    (index,) = packets
    packet = steps[index]
    assert isinstance(packet, bytes)
    half = len(packet) // 2
    return (*steps[:index], Token(packet[:half])), (packet[half:], *steps[index + 1 :])


def _changed(change: Callable[[Reply], Reply]) -> FaultMaker:
    def make(protocol: VendorProtocol, valid: Script) -> Script:
        def script(received: Received) -> Reply:
            return change(valid if isinstance(valid, Reply) else valid(received))

        return script

    return make


def _has_events(reply: Reply) -> bool:
    return reply.headers.get("Content-Type", "").startswith("text/event-stream")


def _without_length(reply: Reply) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name != "Content-Length"}


def _head(headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return _HEAD + lines.encode() + b"\r\n"


def _drips(packet: bytes) -> tuple[Step, ...]:
    return (packet, _DRIP_WAIT) * _DRIPS


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(_BOMB_BYTES), compresslevel=1)
