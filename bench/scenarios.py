"""What is measured: the table of scenarios, and how each is asked of a system."""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal

from bench.floors import COMPLETIONS
from bench.grpc_load import open_grpc
from bench.http_load import Callers, open_http
from bench.peers import LITELLM, PORTKEY
from bench.processes import System
from bench.systems import AIOHTTP, APART, FILLED, GRPC, HOPS, HTTPTOOLS, LINES, REDIS, SQLITE, WORKERS
from tests.tasks import text_body, text_task
from tests.wav import PCM, wav_file

PACED = "REST stream, 1,000 connections, 50 tokens a second (a row counts tokens and their lateness)"
AT_1 = "REST, 1 connection"
AT_32 = "REST, 32 connections"
IN_A_BURST = "REST stream, 200 chunks in a burst"
AT_1000 = "REST, 1,000 connections"
BESIDE = "REST, 1 connection beside 100 streams in bursts"
CHUNKS = 200
"""Events of a stream in one burst."""

VOICE = "pNInz6obpgDQGcFmaJgB"
UPLOAD_BYTES = 5_000_000
_BOUNDARY = "bench"

_PARAGRAPH = "The prompts that people send are words and lines, which have to be escaped in JSON. " * 4 + "\n"

Kind = Literal["text", "speech", "upload"]


@dataclass(frozen=True, slots=True)
class Work:
    """A request. `size` are the bytes of a prompt; with `chunks` it is streamed, with `rate` a second."""

    front_end: Literal["REST", "gRPC"] = "REST"
    kind: Kind = "text"
    size: int = 100
    chunks: int = 0
    rate: int = 0

    def callers(self, system: System, connections: int) -> AbstractAsyncContextManager[Callers]:
        if self.front_end == "gRPC":
            return open_grpc(system.grpc, system.key, text_task(self._prompt()), connections, self.chunks)
        # The floors pass the vendor's end on.
        ending = b"data: [DONE]\n\n" if self.chunks else b""
        return open_http(
            system.url, self.request(system), connections, ending=ending, stamped=bool(self.rate)
        )

    def _prompt(self) -> str:
        pace = f"[[{self.chunks}@{self.rate}]]" if self.rate else f"[[{self.chunks}]]" if self.chunks else ""
        return (pace + _PARAGRAPH * (self.size // len(_PARAGRAPH) + 1))[: self.size]

    def request(self, system: System) -> bytes:
        """The bytes of the request over HTTP."""
        path, content_type, accept = "/api/v1/task", "application/json", "application/json"
        match self.kind:
            case "text":
                streamed = {"stream": True} if self.chunks else {}
                body = json.dumps({**text_body(self._prompt()), **streamed}).encode()
                vendor_path = COMPLETIONS
            case "speech":
                body = json.dumps({"model": "eleven-labs-tts", "text": "Hello!", "voice": VOICE}).encode()
                vendor_path, accept = f"/v1/text-to-speech/{VOICE}/stream", "audio/*"
            case "upload":
                body, content_type = _form(), f"multipart/form-data; boundary={_BOUNDARY}"
                vendor_path = "/v1/speech-to-text"
        headers = {
            "Host": "bench",
            "Authorization": f"Bearer {system.key}",
            "Content-Type": content_type,
            "Accept": accept,
            "Content-Length": str(len(body)),
            **system.headers,
        }
        lines = [f"POST {vendor_path if system.has_vendor_paths else path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "\r\n"]).encode() + body


def _form() -> bytes:
    """A form with a file in it: some minutes of silence."""
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\neleven-labs-stt\r\n'
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    audio = wav_file(PCM, 16_000, 2, bytes(UPLOAD_BYTES))
    return head.encode() + audio + f"\r\n--{_BOUNDARY}--\r\n".encode()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A row of the benchmark. The first of `systems` is the floor. `beside` runs on 100 connections more."""

    name: str
    work: Work
    systems: tuple[str, ...]
    connections: int = 32
    beside: Work | None = None


WHOLE = Work()
STREAM = Work(chunks=CHUNKS)
GRPC_WHOLE = Work("gRPC")
GRPC_STREAM = Work("gRPC", chunks=CHUNKS)

# The paced streams come first: their memory is counted from that of a process that has served nothing.
SCENARIOS = (
    Scenario(PACED, Work(rate=50), (LINES, AIOHTTP, SQLITE), 1000),
    Scenario(AT_32, WHOLE, (AIOHTTP, HTTPTOOLS, SQLITE, REDIS)),
    Scenario(AT_1, WHOLE, (AIOHTTP, HTTPTOOLS, SQLITE, REDIS), 1),
    Scenario("REST, 256 connections", WHOLE, (AIOHTTP, SQLITE, REDIS), 256),
    Scenario(AT_1000, WHOLE, (AIOHTTP, SQLITE, REDIS), 1000),
    Scenario("REST, 16 KB", Work(size=16_000), (AIOHTTP, SQLITE)),
    Scenario("REST, 256 KB", Work(size=256_000), (AIOHTTP, SQLITE)),
    Scenario(IN_A_BURST, STREAM, (LINES, AIOHTTP, HTTPTOOLS, SQLITE, REDIS)),
    Scenario("gRPC, 32 calls", GRPC_WHOLE, (GRPC, SQLITE, REDIS)),
    Scenario("gRPC stream, 200 chunks in a burst", GRPC_STREAM, (GRPC, SQLITE, REDIS)),
    Scenario("Text to speech, raw, 64 KB", Work(kind="speech"), (AIOHTTP, SQLITE)),
    Scenario("Upload of 5 MB", Work(kind="upload"), (AIOHTTP, SQLITE), 4),
    Scenario("REST, gateway and server apart", WHOLE, (HOPS, APART)),
    Scenario("REST, 100,000 accounts and 1,000,000 records", WHOLE, (SQLITE, FILLED)),
    Scenario("REST, two workers", WHOLE, (REDIS, WORKERS)),
    Scenario(BESIDE, WHOLE, (SQLITE,), 1, beside=STREAM),
)

PEER_SCENARIOS = (
    Scenario(AT_32, WHOLE, (AIOHTTP, SQLITE, LITELLM, PORTKEY)),
    Scenario(IN_A_BURST, STREAM, (LINES, SQLITE, LITELLM)),  # Portkey 1.15 fails on Node 20
)
"""The same beside other gateways."""
