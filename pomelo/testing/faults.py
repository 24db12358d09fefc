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
_LINES = dict.fromkeys(_SPEECH, "a sound has neither lines nor text")
_UNMARKED = dict.fromkeys(_SPEECH, "a sound has no end marker: one that ends in good order is whole")
_PIECEMEAL = _only(("text",), "only text has a stream of events", whole="a whole answer has no events")
_COUNTED = _only(("text",), "only text is cut into tokens")
_NEXT = "the same task's next request may be waiting for an answer by then"
_DRAWN = _only(("image",), "only pictures are ordered and fetched")
_HEARD = _only(_SPEECH, "no sound is answered")
_VOICED = _only(_SPEECH, "no voice is asked for")

FAULTS: tuple[Fault, ...] = (
    # No connection.
    Fault("nobody listens", "the connection is refused", UNAVAILABLE, UNAVAILABLE, address=addresses.nobody),
    Fault("no such name", "the name can't be looked up", UNAVAILABLE, UNAVAILABLE, address=addresses.nowhere),
    Fault("no TLS", "TLS is expected, plain HTTP is there", address=addresses.without_tls),
    Fault("no connection", "it is neither taken nor refused", UNAVAILABLE, UNAVAILABLE,
          address=addresses.unanswered, stalls=True),
    # No head.
    Fault("closed at once", "FIN ahead of the head", UNAVAILABLE, UNAVAILABLE, broken.ahead(Stop.CLOSE)),
    Fault("reset at once", "RST ahead of the head", UNAVAILABLE, UNAVAILABLE, broken.ahead(Stop.RESET)),
    Fault("silence at once", "nothing comes, not even a head", LATE, LATE, broken.ahead(Stop.SILENCE),
          stalls=True),
    Fault("garbage", "another protocol in place of HTTP", breaks=broken.raw(b"SSH-2.0-OpenSSH_9\r\n\r\n")),
    Fault("a head without end", "a header after the other, for ever", LATE, LATE,
          broken.dripping_head(b"X-Filler: x\r\n", b"HTTP/1.1 200 OK\r\n"), endless=True),
    Fault("interim heads without end", "102 again and again", LATE, LATE,
          broken.dripping_head(b"HTTP/1.1 102 Processing\r\n\r\n"), endless=True),
    Fault("100,000 headers", "a head of very many lines", breaks=broken.many_headers()),
    Fault("a huge header", "a header of 1 MiB", breaks=broken.huge_header()),
    Fault("a length that is none", "Content-Length: -1",
          breaks=broken.raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}")),
    Fault("chunks that are none", "chunked, but there is no length of a chunk",
          breaks=broken.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")),
    Fault("a chunk that is none, late", "the same, behind more than a client reads at once",
          breaks=broken.late_chunk(), keeps=True),
    # Half an answer.
    Fault("closed after the head", "FIN ahead of the body", breaks=broken.first(Stop.CLOSE)),
    Fault("reset after the head", "RST ahead of the body", breaks=broken.first(Stop.RESET)),
    Fault("silence after the head", "nothing comes but the head", LATE, LATE, broken.first(Stop.SILENCE),
          stalls=True),
    Fault("closed half way", "FIN in the middle of the body", breaks=broken.half_way(Stop.CLOSE)),
    Fault("reset half way", "RST in the middle of the body", breaks=broken.half_way(Stop.RESET)),
    Fault("ended half way", "the body ends in good order, half of it", breaks=broken.half_way(Stop.END),
          lacks=_UNMARKED),
    Fault("silence half way", "the body stops in its middle", LATE, LATE, broken.half_way(Stop.SILENCE),
          stalls=True, keeps=True),
    Fault("drips for ever", "a body whose second half comes a byte at a time and says nothing", LATE, LATE,
          broken.dripping(), endless=True, keeps=True),
    # Statuses, with the vendor's error body.
    *(
        Fault(str(code), "the status", outcome, outcome, broken.status(code))
        for code, outcome in (
            (400, FAILED), (401, FAILED), (402, FAILED), (403, FAILED), (404, FAILED), (408, UNAVAILABLE),
            (409, UNAVAILABLE), (413, "payload_too_large"), (429, UNAVAILABLE), (500, UNAVAILABLE),
            (502, UNAVAILABLE), (503, UNAVAILABLE), (529, UNAVAILABLE),
        )
    ),
    Fault("429, Retry-After", "the status, and a wait of 17 s", UNAVAILABLE, UNAVAILABLE,
          broken.status(429, Retry_After="17"), wait=17),
    Fault("503, Retry-After", "the status, and a wait of two hours, of which 60 s are passed on", UNAVAILABLE,
          UNAVAILABLE, broken.status(503, Retry_After="7200"), wait=60),
    Fault("503 that is never told", "the status, and an error body that stops", UNAVAILABLE, UNAVAILABLE,
          broken.error_without_body(503), stalls=True),
    Fault("503 as a page", "a page for people, with an error's status", UNAVAILABLE, UNAVAILABLE,
          broken.page(503)),
    Fault("a redirect", "307, to a place where nobody may go", breaks=broken.redirect()),
    # Bodies.
    Fault("a page", "a page for people, with 200", breaks=broken.page()),
    Fault("nothing", "an empty body, with 200", breaks=broken.body(lambda events: b"")),
    Fault("an empty object", "JSON of another shape", breaks=broken.body(
        lambda events: b"data: {}\n\n" if events else b"{}  ")),
    Fault("broken JSON", "JSON that ends within a text", breaks=broken.broken_json()),
    Fault("half a character", "a text that is no UTF-8, in otherwise sound JSON",
          breaks=broken.half_character(), lacks=_LINES),
    Fault("an unfinished event", "the last event lacks its line ends", stream=OK,
          breaks=broken.unfinished_event(), lacks=_PIECEMEAL),
    Fault("a huge line", "1 MB without a line's end", breaks=broken.huge_line(), lacks=_LINES),
    Fault("oversize", "72 MiB of JSON", breaks=broken.oversize()),
    Fault("a sound without end", "a sound goes on for 1 GiB", breaks=broken.flooding(), lacks=_HEARD),
    Fault("a bomb", "64 MiB of nothing as 64 KiB of gzip, though nobody asked for that",
          breaks=broken.bomb()),
    Fault("one answer too many", "a good answer, and another one that nobody asked for, which must not be the"
          " next caller's", OK, OK, broken.one_too_many(), lacks={"image": _NEXT}),
    # In the vendor's own words: streams and counts.
    Fault("no end marker", "a stream that ends in good order but for its end marker", keeps=True,
          lacks=_PIECEMEAL),
    Fault("silence after the end marker", "the stream is complete, its connection stays open", stream=OK,
          lacks=_PIECEMEAL),
    Fault("a text without end", "a good answer of 12 MB", lacks=_COUNTED),
    Fault("busy half way", "an error within a stream, which says that the vendor is busy",
          stream=UNAVAILABLE, lacks=_PIECEMEAL),
    Fault("an unknown error half way", "an error within a stream, with a code that nobody knows",
          lacks=_PIECEMEAL),
    Fault("no finish reason", "an answer that doesn't say why it ends", lacks=_COUNTED),
    Fault("no usage", "an answer without a count of tokens", OK, OK, uncounted=True, lacks=_COUNTED),
    Fault("usage below 0", "a count of -1 tokens", OK, OK, uncounted=True, lacks=_COUNTED),
    Fault("usage of 2^63", "a count that no integer of ours could hold", OK, OK, uncounted=True,
          lacks=_COUNTED),
    # In the vendor's own words: refusals.
    Fault("an error with 200", "an error object in place of the answer"),
    Fault("out of money", "our account with the vendor is empty"),
    Fault("too many at once", "the vendor's limit of tasks at a time", UNAVAILABLE, UNAVAILABLE),
    Fault("unknown key", "the vendor refuses our key"),
    Fault("unknown model", "the vendor has no such model"),
    Fault("against the policy", "the vendor's content policy refuses the prompt or the output",
          "content_policy_violation", "content_policy_violation"),
    Fault("too long", "more than the model takes", "context_length_exceeded", "context_length_exceeded"),
    Fault("a value not taken", "the vendor blames a field that the caller gave", "invalid_parameter",
          "invalid_parameter"),
    Fault("unknown voice", "the vendor has no such voice", "invalid_parameter", "invalid_parameter",
          lacks=_VOICED),
    # In the vendor's own words: pictures that are ordered, asked about and fetched.
    Fault("failed afterwards", "the order was taken, the task has failed", lacks=_DRAWN),
    Fault("lost", "the order was taken, and the vendor knows nothing of it", lacks=_DRAWN),
    Fault("questions that fail", "the order was taken, and questions about it get 500", UNAVAILABLE,
          UNAVAILABLE, lacks=_DRAWN),
    Fault("a link astray", "the picture's link leads to a private address", lacks=_DRAWN),
    Fault("a link with our key astray", "the link for questions leads elsewhere", lacks=_DRAWN),
    Fault("a link that is none", "the picture's link is a number", lacks=_DRAWN),
    Fault("not delivered", "the picture's link has expired: 403", lacks=_DRAWN),
    Fault("delivered in part", "each download of the picture is cut half way", lacks=_DRAWN),
    Fault("delivered oversize", "the picture's length is told as 1 TB", lacks=_DRAWN),
    Fault("no picture", "what is delivered is a page", lacks=_DRAWN),
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
