"""The table of what can go wrong at a vendor, with the expected error codes: `FAULTS`.

Most faults can be played with any protocol; the others are defined by the vendor's `VendorProtocol`. If a
fault is impossible for a task type, or for whole or streamed responses, the table gives the reason.

The codes are those after all retries, because each request meets the same fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from pomelo.testing import addresses, broken
from pomelo.testing.broken import FaultMaker
from pomelo.testing.reply import Script, Stop, VendorProtocol

TASK_TYPES = ("text", "image", "text_to_speech", "speech_to_speech", "speech_to_text")

OK = "ok"
"""In place of a code: a valid response, in spite of the fault."""

UNAVAILABLE, FAILED, TIMEOUT = "provider_unavailable", "provider_failed", "deadline_exceeded"

Address = Callable[[str], AbstractContextManager[str]]
"""Returns a URL without a vendor for the vendor's URL; valid within the context."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table.

    `whole` and `stream` are the codes with which a task ends. `breaks` makes the script, or `address` leads
    away from the vendor; without both, the vendor's protocol has the script. `stalls`: timeouts of the
    provider end the fault; `endless`: only the caller's deadline does. `keeps`: the output of a stream before
    the fault is delivered. `uncounted`: a response may end without usage, because the vendor's count is
    impossible. `json`: a response that is a file can't have it. `wait` is the Retry-After in seconds.
    `unsupported` gives the reasons why the fault is impossible, by task type, or by "whole" and "stream".
    """

    name: str
    description: str
    whole: str = FAILED
    stream: str = FAILED
    breaks: FaultMaker | None = None
    address: Address | None = None
    stalls: bool = False
    endless: bool = False
    keeps: bool = False
    uncounted: bool = False
    json: bool = False
    wait: int | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)

    def code(self, stream: bool) -> str:
        """Return the code with which a task ends."""
        return self.stream if stream else self.whole

    @property
    def vendor_specific(self) -> bool:
        """Whether the vendor's protocol must have the script."""
        return self.breaks is None and self.address is None

    def unsupported_reason(self, protocol: VendorProtocol, task_type: str, stream: bool) -> str:
        """Return why the fault is impossible with this vendor and task type; empty if it is possible."""
        reason = self.unsupported.get("stream" if stream else "whole") or self.unsupported.get(task_type)
        if self.json and task_type in protocol.raw:
            reason = reason or "the response is a file: it has neither lines nor an end marker"
        if reason is None and self.vendor_specific:
            faults = protocol.faults.get(task_type)
            if faults is None or self.name not in faults.scripts:
                reason = None if faults is None else faults.unsupported.get(self.name)
                reason = reason or f"the protocol of {protocol.name} does not define it"
        return reason or ""

    def script(self, protocol: VendorProtocol, task_type: str) -> Script:
        """Return the script that plays the fault at every request.

        Raises:
            KeyError: the vendor's protocol does not define it.
        """
        if self.breaks is not None:
            return self.breaks(protocol, protocol.default)
        if self.address is not None:
            return protocol.default
        return protocol.faults[task_type].scripts[self.name]


def _only(task_types: tuple[str, ...], reason: str, **more: str) -> dict[str, str]:
    return {task_type: reason for task_type in TASK_TYPES if task_type not in task_types} | more


_SPEECH = ("text_to_speech", "speech_to_speech")
_LINES = dict.fromkeys(_SPEECH, "audio has neither lines nor text")
_UNMARKED = dict.fromkeys(_SPEECH, "audio has no end marker: a body that ends correctly is complete")
_EVENTS_ONLY = _only(("text",), "only text has a stream of events", whole="a whole response has no events")
_TEXT_ONLY = _only(("text",), "only text has tokens")
_NEXT = "the next request of the same task may be waiting for its response by then"
_IMAGE_ONLY = _only(("image",), "only images are ordered and downloaded")
_AUDIO_ONLY = _only(_SPEECH, "the response is not audio")
_MEGABYTE = b"x" * 1_000_000 + b"\n\n"
_VOICE_ONLY = _only(_SPEECH, "the request has no voice")

FAULTS: tuple[Fault, ...] = (
    # No connection.
    Fault("connection refused", "the connection is refused", UNAVAILABLE, UNAVAILABLE,
          address=addresses.refused_connection),
    Fault("unknown host", "the name can't be looked up", UNAVAILABLE, UNAVAILABLE,
          address=addresses.unknown_host),
    Fault("no TLS", "the client expects TLS, the server speaks HTTP", address=addresses.without_tls),
    Fault("no connection", "the connection is neither accepted nor refused", UNAVAILABLE, UNAVAILABLE,
          address=addresses.unanswered_connection, stalls=True),
    # No head.
    Fault("closed immediately", "FIN before the head", UNAVAILABLE, UNAVAILABLE,
          broken.before_head(Stop.CLOSE)),
    Fault("reset immediately", "RST before the head", UNAVAILABLE, UNAVAILABLE,
          broken.before_head(Stop.RESET)),
    Fault("no response", "no data arrives, not even a head", TIMEOUT, TIMEOUT,
          broken.before_head(Stop.SILENCE), stalls=True),
    Fault("garbage", "another protocol in place of HTTP", breaks=broken.raw(b"SSH-2.0-OpenSSH_9\r\n\r\n")),
    Fault("a head without end", "one header after another, forever", TIMEOUT, TIMEOUT,
          broken.dripping_head(b"X-Filler: x\r\n", b"HTTP/1.1 200 OK\r\n"), endless=True),
    Fault("interim heads without end", "102 again and again", TIMEOUT, TIMEOUT,
          broken.dripping_head(b"HTTP/1.1 102 Processing\r\n\r\n"), endless=True),
    Fault("100,000 headers", "a head of very many lines", breaks=broken.raw(
        b"HTTP/1.1 200 OK\r\n", b"X-Filler: x\r\n" * 100_000, b"Content-Length: 2\r\n\r\n{}")),
    Fault("a huge header", "a header of 1 MiB", breaks=broken.raw(
        b"HTTP/1.1 200 OK\r\nX-Filler: ", b"x" * 1024 * 1024, b"\r\nContent-Length: 2\r\n\r\n{}")),
    Fault("an invalid length", "Content-Length: -1",
          breaks=broken.raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}")),
    Fault("invalid chunks", "chunked, but a chunk has no length",
          breaks=broken.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")),
    Fault("a late invalid chunk", "the same, after more data than a client reads ahead",
          breaks=broken.late_chunk, keeps=True),
    # Half a response.
    Fault("closed after the head", "FIN before the body", breaks=broken.before_body(Stop.CLOSE)),
    Fault("reset after the head", "RST before the body", breaks=broken.before_body(Stop.RESET)),
    Fault("silence after the head", "no data arrives after the head", TIMEOUT, TIMEOUT,
          broken.before_body(Stop.SILENCE), stalls=True),
    Fault("closed half way", "FIN in the middle of the body", breaks=broken.half_way(Stop.CLOSE)),
    Fault("reset half way", "RST in the middle of the body", breaks=broken.half_way(Stop.RESET)),
    Fault("ended half way", "half of the body, which ends correctly", breaks=broken.half_way(Stop.END),
          json=True, unsupported=_UNMARKED),
    Fault("silence half way", "the body stops in its middle", TIMEOUT, TIMEOUT, broken.half_way(Stop.SILENCE),
          stalls=True, keeps=True),
    Fault("drips forever", "the second half of the body arrives a byte at a time, without content", TIMEOUT,
          TIMEOUT, broken.dripping, endless=True, keeps=True),
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
    Fault("503, Retry-After", "the status, and a wait of two hours, which is limited to 60 s", UNAVAILABLE,
          UNAVAILABLE, broken.status(503, Retry_After="7200"), wait=60),
    Fault("503 without an end", "the status, and an error body that stalls", UNAVAILABLE, UNAVAILABLE,
          broken.error_without_body(503), stalls=True),
    Fault("503 as a page", "an HTML page with an error status", UNAVAILABLE, UNAVAILABLE,
          broken.page(503)),
    Fault("a redirect", "307, to an address that must not be requested", breaks=broken.redirect),
    # Bodies.
    Fault("a page", "an HTML page, with 200", breaks=broken.page()),
    Fault("nothing", "an empty body, with 200", breaks=broken.body(b"", b"")),
    Fault("an empty object", "JSON of another shape", breaks=broken.body(b"{}  ", b"data: {}\n\n")),
    Fault("broken JSON", "JSON that ends within a text",
          breaks=broken.body(b'{"id": "', b'data: {"id": "\n\n')),
    Fault("half a character", "text that is not UTF-8, in otherwise valid JSON",
          breaks=broken.half_character, json=True, unsupported=_LINES),
    Fault("an unfinished event", "the last event lacks its line ends", stream=OK,
          breaks=broken.unfinished_event, unsupported=_EVENTS_ONLY),
    Fault("a huge line", "1 MB without a line end", breaks=broken.body(_MEGABYTE, b"data: " + _MEGABYTE),
          unsupported=_LINES),
    Fault("oversize", "72 MiB of JSON", breaks=broken.oversize),
    Fault("audio without end", "1 GiB of audio", breaks=broken.flooding, unsupported=_AUDIO_ONLY),
    Fault("a bomb", "64 MiB of zeros as 64 KiB of gzip, without a request for compression",
          breaks=broken.bomb),
    Fault("one response too many", "a valid response, and an unrequested one, which must not reach the next"
          " caller", OK, OK, broken.one_too_many, unsupported={"image": _NEXT}),
    # Specific to the vendor: streams and counts.
    Fault("no end marker", "a stream that ends correctly, but without its end marker", keeps=True,
          unsupported=_EVENTS_ONLY),
    Fault("silence after the end marker", "the stream is complete, but its connection stays open", stream=OK,
          unsupported=_EVENTS_ONLY),
    Fault("a text without end", "a valid response of 12 MB", unsupported=_TEXT_ONLY),
    Fault("busy half way", "an error within a stream: the vendor is busy",
          stream=UNAVAILABLE, unsupported=_EVENTS_ONLY),
    Fault("an unknown error half way", "an error within a stream, with an unknown code",
          unsupported=_EVENTS_ONLY),
    Fault("no finish reason", "a response without the reason for its end", unsupported=_TEXT_ONLY),
    Fault("no usage", "a response without a count of tokens", OK, OK, uncounted=True, unsupported=_TEXT_ONLY),
    Fault("usage below 0", "a count of -1 tokens", OK, OK, uncounted=True, unsupported=_TEXT_ONLY),
    Fault("usage of 2^63", "a count that does not fit into 64 bits", OK, OK, uncounted=True,
          unsupported=_TEXT_ONLY),
    # Specific to the vendor: refusals.
    Fault("an error with 200", "an error object in place of the response"),
    Fault("out of money", "our account with the vendor is empty"),
    Fault("too many concurrent tasks", "the vendor's limit of concurrent tasks", UNAVAILABLE, UNAVAILABLE),
    Fault("unknown key", "the vendor refuses our key"),
    Fault("unknown model", "the vendor has no such model"),
    Fault("against the policy", "the vendor's content policy refuses the prompt or the output",
          "content_policy_violation", "content_policy_violation"),
    Fault("too long", "the input is too long for the model", "context_length_exceeded",
          "context_length_exceeded"),
    Fault("an invalid value", "the vendor refuses a field of the caller", "invalid_parameter",
          "invalid_parameter"),
    Fault("unknown voice", "the vendor has no such voice", "invalid_parameter", "invalid_parameter",
          unsupported=_VOICE_ONLY),
    # Specific to the vendor: images that are ordered, polled for and downloaded.
    Fault("failed afterwards", "the order is accepted, then the task fails", unsupported=_IMAGE_ONLY),
    Fault("lost", "the order is accepted, then the task is unknown", unsupported=_IMAGE_ONLY),
    Fault("failing polls", "the order is accepted, then each poll gets 500", UNAVAILABLE,
          UNAVAILABLE, unsupported=_IMAGE_ONLY),
    Fault("a private link", "the link of the image leads to a private address", unsupported=_IMAGE_ONLY),
    Fault("a foreign polling link", "the link for polls leads to another host", unsupported=_IMAGE_ONLY),
    Fault("an invalid link", "the link of the image is a number", unsupported=_IMAGE_ONLY),
    Fault("not delivered", "the link of the image has expired: 403", unsupported=_IMAGE_ONLY),
    Fault("delivered in part", "each download of the image is truncated", unsupported=_IMAGE_ONLY),
    Fault("delivered oversize", "the image has a Content-Length of 1 TB", unsupported=_IMAGE_ONLY),
    Fault("not an image", "an HTML page in place of the image", unsupported=_IMAGE_ONLY),
    Fault("an image without its end", "a part of the image, in a response or download that ends correctly",
          unsupported=_IMAGE_ONLY),
)  # fmt: skip
"""Every fault; names are unique."""

VENDOR_SPECIFIC = frozenset(fault.name for fault in FAULTS if fault.vendor_specific)
"""The names that `VendorFaults` may have."""


def unsupported_faults(protocol: VendorProtocol, task_type: str) -> dict[tuple[str, bool], str]:
    """Return the faults that are impossible with a vendor and task type: (name, streamed) -> the reason."""
    return {
        (fault.name, stream): reason
        for fault in FAULTS
        for stream in (False, True)
        if (reason := fault.unsupported_reason(protocol, task_type, stream))
    }
