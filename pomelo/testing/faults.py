"""The one table of what can go wrong at a vendor, and what has to come of it: `FAULTS`.

`pomelo.testing.suite` runs it over a provider, docs/faults.md shows it. Most faults can be played on any
wire; the others are worded by the vendor's `Wire`. A fault that can't be at a kind of task, or in a whole
answer or a stream, is left out with a reason, never silently.

The codes are those of the last failure: to ask again doesn't mend a fault, because each request meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from pomelo.testing import addresses, broken
from pomelo.testing.broken import Breaking
from pomelo.testing.reply import Script, Stop, Wire

KINDS = ("text", "image", "text_to_speech", "speech_to_speech", "speech_to_text")
"""The kinds of task."""

OK = "ok"
"""In place of a code: a good answer, in spite of the fault."""

UNAVAILABLE, FAILED, LATE = "provider_unavailable", "provider_failed", "deadline_exceeded"

Address = Callable[[str], AbstractContextManager[str]]
"""Gives a URL at which no vendor is for the vendor's URL; good within the context."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row.

    `whole` and `stream` are the codes in which a task ends. `breaks` makes the script of it; without, the
    vendor's wire has it in its own words, unless `address` leads away from the vendor. `stalls` is for those
    that the provider's limits end, `endless` for those that only the caller's deadline does. `keeps`: what a
    stream said before it stands. `uncounted`: a good stream may end without a count of tokens, as that of the
    vendor can't be true. `wait` is the one in seconds that is proposed to the caller.
    `lacks` says why it can't be, by the kind of task or by "whole" and "stream".
    """

    name: str
    about: str
    whole: str = FAILED
    stream: str = FAILED
    breaks: Breaking | None = None
    address: Address | None = None
    stalls: bool = False
    endless: bool = False
    keeps: bool = False
    uncounted: bool = False
    wait: int | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)

    def code(self, stream: bool) -> str:
        """The code in which a task ends."""
        return self.stream if stream else self.whole

    @property
    def worded(self) -> bool:
        """Whether the vendor's wire must have it in its own words."""
        return self.breaks is None and self.address is None

    def absence(self, wire: Wire, kind: str, stream: bool) -> str:
        """Why it can't be with this vendor, at this kind of task; empty where it can."""
        why = self.lacks.get("stream" if stream else "whole") or self.lacks.get(kind)
        if why is None and self.worded:
            wording = wire.wordings.get(kind)
            if wording is None or self.name not in wording.said:
                why = None if wording is None else wording.lacks.get(self.name)
                why = why or f"the wire of {wire.name} has no words for it"
        return why or ""

    def script(self, wire: Wire, kind: str) -> Script:
        """Plays it at every request of a vendor.

        Raises:
            KeyError: the vendor has no words for it.
        """
        if self.breaks is not None:
            return self.breaks(wire, wire.default)
        return wire.default if self.address is not None else wire.wordings[kind].said[self.name]


def _only(kinds: tuple[str, ...], why: str, **more: str) -> dict[str, str]:
    return {kind: why for kind in KINDS if kind not in kinds} | more


_SPEECH = ("text_to_speech", "speech_to_speech")
_LINES = dict.fromkeys(_SPEECH, "audio has neither lines nor text")
_UNMARKED = dict.fromkeys(_SPEECH, "audio has no end marker: if it ends normally, it is complete")
_PIECEMEAL = _only(("text",), "only text is a stream of events", whole="a whole answer has no events")
_COUNTED = _only(("text",), "only text is counted in tokens")
_NEXT = "the same task's next request may be waiting for an answer by then"
_DRAWN = _only(("image",), "only images are polled for and downloaded")
_HEARD = _only(_SPEECH, "the answer is not audio")
_VOICED = _only(_SPEECH, "the request has no voice")

FAULTS: tuple[Fault, ...] = (
    # No connection.
    Fault("connection refused", "nothing listens on the port", UNAVAILABLE, UNAVAILABLE,
          address=addresses.nobody),
    Fault("unknown host", "the host name can't be resolved", UNAVAILABLE, UNAVAILABLE,
          address=addresses.nowhere),
    Fault("no TLS", "plain HTTP where TLS is expected", address=addresses.without_tls),
    Fault("no connection", "the connection is neither accepted nor refused", UNAVAILABLE, UNAVAILABLE,
          address=addresses.unanswered, stalls=True),
    # No head.
    Fault("closed before the head", "FIN before the response head", UNAVAILABLE, UNAVAILABLE,
          broken.ahead(Stop.CLOSE)),
    Fault("reset before the head", "RST before the response head", UNAVAILABLE, UNAVAILABLE,
          broken.ahead(Stop.RESET)),
    Fault("silence before the head", "no byte is sent", LATE, LATE, broken.ahead(Stop.SILENCE),
          stalls=True),
    Fault("not HTTP", "another protocol instead of HTTP", breaks=broken.raw(b"SSH-2.0-OpenSSH_9\r\n\r\n")),
    Fault("endless head", "one header after another, for ever", LATE, LATE,
          broken.dripping_head(b"X-Filler: x\r\n", b"HTTP/1.1 200 OK\r\n"), endless=True),
    Fault("endless interim responses", "102 Processing again and again", LATE, LATE,
          broken.dripping_head(b"HTTP/1.1 102 Processing\r\n\r\n"), endless=True),
    Fault("100,000 headers", "a response head with very many lines", breaks=broken.many_headers()),
    Fault("huge header", "one header of 1 MiB", breaks=broken.huge_header()),
    Fault("invalid length", "Content-Length: -1",
          breaks=broken.raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}")),
    Fault("invalid chunk", "chunked encoding without the length of a chunk",
          breaks=broken.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")),
    Fault("invalid chunk, late", "the same, after more than a client reads in one step",
          breaks=broken.late_chunk(), keeps=True),
    # Half an answer.
    Fault("closed after the head", "FIN before the body", breaks=broken.first(Stop.CLOSE)),
    Fault("reset after the head", "RST before the body", breaks=broken.first(Stop.RESET)),
    Fault("silence after the head", "nothing is sent after the head", LATE, LATE, broken.first(Stop.SILENCE),
          stalls=True),
    Fault("closed half way", "FIN in the middle of the body", breaks=broken.half_way(Stop.CLOSE)),
    Fault("reset half way", "RST in the middle of the body", breaks=broken.half_way(Stop.RESET)),
    Fault("ended half way", "the response ends normally, but has only half of the body",
          breaks=broken.half_way(Stop.END), lacks=_UNMARKED),
    Fault("silence half way", "nothing is sent after half of the body", LATE, LATE,
          broken.half_way(Stop.SILENCE), stalls=True, keeps=True),
    Fault("endless drip", "after half of the body, bytes without content arrive one at a time, for ever",
          LATE, LATE, broken.dripping(), endless=True, keeps=True),
    # Statuses, with the vendor's error body.
    *(
        Fault(str(code), "this status", outcome, outcome, broken.status(code))
        for code, outcome in (
            (400, FAILED), (401, FAILED), (402, FAILED), (403, FAILED), (404, FAILED), (408, UNAVAILABLE),
            (409, UNAVAILABLE), (413, "payload_too_large"), (429, UNAVAILABLE), (500, UNAVAILABLE),
            (502, UNAVAILABLE), (503, UNAVAILABLE), (529, UNAVAILABLE),
        )
    ),
    Fault("429, Retry-After", "the status, and a wait of 17 s", UNAVAILABLE, UNAVAILABLE,
          broken.status(429, Retry_After="17"), wait=17),
    Fault("503, Retry-After", "the status, and a wait of two hours; callers get 60 s", UNAVAILABLE,
          UNAVAILABLE, broken.status(503, Retry_After="7200"), wait=60),
    Fault("503, silence", "the status, and an error body that stops half way", UNAVAILABLE, UNAVAILABLE,
          broken.error_without_body(503), stalls=True),
    Fault("503 as HTML", "the status, and an HTML page", UNAVAILABLE, UNAVAILABLE,
          broken.page(503)),
    Fault("redirect", "307, to an address that must not be called", breaks=broken.redirect()),
    # Bodies.
    Fault("HTML", "an HTML page, with status 200", breaks=broken.page()),
    Fault("empty body", "no body, with status 200", breaks=broken.body(lambda events: b"")),
    Fault("empty object", "JSON without the expected fields", breaks=broken.body(
        lambda events: b"data: {}\n\n" if events else b"{}  ")),
    Fault("broken JSON", "JSON that ends inside a string", breaks=broken.broken_json()),
    Fault("invalid UTF-8", "a string that is not UTF-8, in otherwise valid JSON",
          breaks=broken.half_character(), lacks=_LINES),
    Fault("unfinished event", "the last event lacks its line ends", stream=OK,
          breaks=broken.unfinished_event(), lacks=_PIECEMEAL),
    Fault("huge line", "1 MB without a line end", breaks=broken.huge_line(), lacks=_LINES),
    Fault("oversized body", "72 MiB of JSON", breaks=broken.oversize()),
    Fault("oversized audio", "1 GiB of audio", breaks=broken.flooding(), lacks=_HEARD),
    Fault("gzip bomb", "64 MiB of empty data as 64 KiB of gzip, which was not requested",
          breaks=broken.bomb()),
    Fault("second answer", "a good answer and then an unrequested one, which the next caller must not get",
          OK, OK, broken.one_too_many(), lacks={"image": _NEXT}),
    # In the vendor's own words: streams and counts.
    Fault("no end marker", "a stream that ends normally, but without its end marker", keeps=True,
          lacks=_PIECEMEAL),
    Fault("silence after the end marker", "the stream is complete, but its connection stays open", stream=OK,
          lacks=_PIECEMEAL),
    Fault("oversized text", "a good answer of 12 MB", lacks=_COUNTED),
    Fault("busy half way", "an error event that reports that the vendor is overloaded",
          stream=UNAVAILABLE, lacks=_PIECEMEAL),
    Fault("unknown error half way", "an error event with an unknown code",
          lacks=_PIECEMEAL),
    Fault("no finish reason", "an answer without the reason why it ends", lacks=_COUNTED),
    Fault("no usage", "an answer without token counts", OK, OK, uncounted=True, lacks=_COUNTED),
    Fault("usage below 0", "a token count of -1", OK, OK, uncounted=True, lacks=_COUNTED),
    Fault("usage of 2^63", "a token count above the largest 64-bit integer", OK, OK, uncounted=True,
          lacks=_COUNTED),
    # In the vendor's own words: refusals.
    Fault("error with 200", "an error object instead of the answer"),
    Fault("out of money", "Pomelo's account with the vendor is empty"),
    Fault("too many concurrent tasks", "the vendor's limit on concurrent tasks", UNAVAILABLE, UNAVAILABLE),
    Fault("unknown key", "the vendor refuses Pomelo's key"),
    Fault("unknown model", "the vendor has no such model"),
    Fault("against the policy", "the vendor's content policy refuses the prompt or the output",
          "content_policy_violation", "content_policy_violation"),
    Fault("too long", "the prompt is longer than the model takes", "context_length_exceeded",
          "context_length_exceeded"),
    Fault("refused value", "the vendor refuses a field that the caller set", "invalid_parameter",
          "invalid_parameter"),
    Fault("unknown voice", "the vendor has no such voice", "invalid_parameter", "invalid_parameter",
          lacks=_VOICED),
    # In the vendor's own words: images that are polled for and downloaded.
    Fault("failed later", "the vendor accepts the task, then reports that it failed", lacks=_DRAWN),
    Fault("task lost", "the vendor accepts the task, then does not know it", lacks=_DRAWN),
    Fault("polling fails", "the vendor accepts the task, then answers polls with 500", UNAVAILABLE,
          UNAVAILABLE, lacks=_DRAWN),
    Fault("private link", "the image's link leads to a private address", lacks=_DRAWN),
    Fault("foreign polling link", "the link for polling, which gets Pomelo's key, leads to another host",
          lacks=_DRAWN),
    Fault("invalid link", "the image's link is a number", lacks=_DRAWN),
    Fault("expired link", "the download of the image is a 403", lacks=_DRAWN),
    Fault("cut download", "each download of the image is cut half way", lacks=_DRAWN),
    Fault("oversized download", "the image's Content-Length is 1 TB", lacks=_DRAWN),
    Fault("not an image", "the download of the image is an HTML page", lacks=_DRAWN),
)  # fmt: skip
"""Every fault; no two have one name."""

WORDED = frozenset(fault.name for fault in FAULTS if fault.worded)
"""The names that a wire's `Wording` may have."""


def left_out(wire: Wire, kind: str) -> dict[tuple[str, bool], str]:
    """The faults that can't be at a kind of task of a vendor, (name, streamed), and why."""
    return {
        (fault.name, stream): why
        for fault in FAULTS
        for stream in (False, True)
        if (why := fault.absence(wire, kind, stream))
    }
