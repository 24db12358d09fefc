"""Makes scripts of faults from the script of a valid response, for any vendor."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from pomelo.testing.reply import Gate, Received, Reply, Script, Step, Stop, Token, VendorProtocol

BODY = "canary-body <b>of the vendor's</b>"
"""The content of error bodies, beside the caller's key and prompt. Callers must never see it."""

FORBIDDEN_PATH = "/must-not-be-requested"

FaultMaker = Callable[[VendorProtocol, Script], Script]
"""Makes the script of a fault from a protocol and its script of a valid response."""

_DRIPS = 4000
_DRIP_WAIT = 0.02
_BOMB_BYTES = 64 * 1024 * 1024
_MEBIBYTE = b"x" * (1024 * 1024)
_OVERSIZE_MEBIBYTES = 72
_FLOOD_PACKETS = 1024
_LATE_CHUNKS = 3000
_HEAD = b"HTTP/1.1 200 OK\r\n"


def forbidden_link(received: Received) -> str:
    """Return a link to the server by another host name than that of the request."""
    port = received.headers["Host"].rpartition(":")[2]
    return f"http://localhost:{port}{FORBIDDEN_PATH}"


def changed(change: Callable[[Reply], Reply]) -> FaultMaker:
    """The reply that `change` makes from a valid one; also a decorator."""

    def make(protocol: VendorProtocol, valid: Script) -> Script:
        return lambda received: change(_reply(valid, received))

    return make


def instead(make: Callable[[Received], Reply]) -> FaultMaker:
    """Another reply in place of the valid one."""
    return lambda protocol, valid: make


def before_head(*steps: Step) -> FaultMaker:
    """Steps before the head of a valid response."""
    return changed(lambda reply: replace(reply, before=steps))


def before_body(*steps: Step) -> FaultMaker:
    """Steps between the head and the body of a valid response."""
    return changed(lambda reply: replace(reply, steps=(*steps, *reply.steps)))


def half_way(*steps: Step) -> FaultMaker:
    """The first half of the body of a valid response, and then these steps."""
    return changed(lambda reply: replace(reply, steps=(*halves(reply.steps)[0], *steps)))


def held_half_way(gate: Gate) -> FaultMaker:
    """A valid response that waits at a gate in the middle of its body."""

    def change(reply: Reply) -> Reply:
        start, rest = halves(reply.steps)
        return replace(reply, steps=(*start, gate, *rest))

    return changed(change)


def body(whole: bytes, events: bytes) -> FaultMaker:
    """The head of a valid response with another body, for a whole response and for a stream of events."""
    return changed(lambda reply: replace(reply, steps=(events if _has_events(reply) else whole,)))


def status(code: int, **headers: str) -> FaultMaker:
    """The vendor's refusal, which repeats the caller's key and prompt."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}

    def make(protocol: VendorProtocol, valid: Script) -> Script:
        def refuse(received: Received) -> Reply:
            key = " ".join(value for value in received.headers.values() if "key" in value)
            reply = protocol.refusal(code, f"{BODY} {key} {received.prompt}")
            return replace(reply, headers={**reply.headers, **names})

        return refuse

    return make


def raw(*packets: bytes) -> FaultMaker:
    """Packets in place of a response, and the end of the connection."""
    return instead(lambda received: Reply(before=(*packets, Stop.CLOSE)))


@changed
def dripping(reply: Reply) -> Reply:
    """A valid response whose second half arrives a byte at a time, without content."""
    drop = b":\n" if _has_events(reply) else b" "
    return replace(reply, steps=(*halves(reply.steps)[0], *_drips(drop)))


def dripping_head(packet: bytes, beginning: bytes = b"") -> FaultMaker:
    """A head that never ends: `beginning`, and then `packet` again and again."""
    return instead(lambda received: Reply(before=(beginning, *_drips(packet))))


@changed
def half_character(reply: Reply) -> Reply:
    """A valid response whose first text is cut within a character: it is not UTF-8, in otherwise valid
    JSON."""
    return _with_body(reply, _body(reply).replace(b'": "', b'": "caf\xc3', 1))


@changed
def unfinished_event(reply: Reply) -> Reply:
    """A valid response whose last event has no line ends."""
    return _with_body(reply, _body(reply).rstrip(b"\n"))


def page(code: int = 200) -> FaultMaker:
    """An HTML page, as a proxy sends it."""
    html = f"<!doctype html><title>Welcome</title><p>Sign in. {BODY}\n\n".encode()
    head = {"Content-Type": "text/html; charset=utf-8"}
    return instead(lambda received: Reply(code, head, (html,)))


redirect = instead(lambda received: Reply(307, {"Location": forbidden_link(received)}))
"""A redirect to a forbidden link."""


oversize = instead(
    lambda received: Reply(
        headers={"Content-Type": "application/json"},
        steps=(b'{"id": "', *(_MEBIBYTE,) * _OVERSIZE_MEBIBYTES, b'"}'),
    )
)
"""More JSON than a client should read."""


@changed
def bomb(reply: Reply) -> Reply:
    """A compressed body that is huge when it is decompressed. The request did not ask for compression."""
    return replace(_with_body(reply, _bomb()), headers=_without_length(reply) | {"Content-Encoding": "gzip"})


@changed
def one_too_many(reply: Reply) -> Reply:
    """A valid response and, a moment later on the same connection, one without a request."""
    data = _body(reply)
    answer = _head(reply, {"Content-Length": str(len(data))}) + data
    unrequested = json.dumps({"id": BODY}).encode()
    head = {"Content-Type": "application/json"}
    return replace(reply, headers=head, before=(answer, _DRIP_WAIT), steps=(unrequested,))


@changed
def late_chunk(reply: Reply) -> Reply:
    """A valid response that continues in many small chunks, and ends with an invalid one after more data than
    a client reads ahead."""
    filler = (b":" if _has_events(reply) else b" ") * 99 + b"\n"
    data = b"".join(step for step in halves(reply.steps)[0] if isinstance(step, bytes))
    packets = [packet for packet in (data, *(filler,) * _LATE_CHUNKS) if packet]
    body = b"".join(b"%x\r\n%s\r\n" % (len(packet), packet) for packet in packets)
    head = _head(reply, {"Transfer-Encoding": "chunked"})
    return replace(reply, before=(head + body + b"no chunk\r\n", Stop.SILENCE), steps=())


@changed
def flooding(reply: Reply) -> Reply:
    """A valid response whose last packet is repeated as fast as possible."""
    packet = next((step for step in reversed(reply.steps) if isinstance(step, bytes)), b"x")
    flood = packet * (len(_MEBIBYTE) // len(packet) + 1)
    return _with_body(reply, *reply.steps, *(flood,) * _FLOOD_PACKETS)


def without_end(valid: Script) -> Script:
    """A complete response whose connection stays open."""

    def script(received: Received) -> Reply:
        reply = _reply(valid, received)
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


def _reply(script: Script, received: Received) -> Reply:
    return script if isinstance(script, Reply) else script(received)


def _has_events(reply: Reply) -> bool:
    return reply.headers.get("Content-Type", "").startswith("text/event-stream")


def _without_length(reply: Reply) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name != "Content-Length"}


def _body(reply: Reply) -> bytes:
    return b"".join(step for step in reply.steps if isinstance(step, bytes))


def _with_body(reply: Reply, *steps: Step) -> Reply:
    return replace(reply, headers=_without_length(reply), steps=steps)


def _head(reply: Reply, framing: dict[str, str]) -> bytes:
    headers = _without_length(reply) | framing
    return _HEAD + "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n"


def _drips(packet: bytes) -> tuple[Step, ...]:
    return (packet, _DRIP_WAIT) * _DRIPS


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(_BOMB_BYTES), compresslevel=1)
