"""The fault upstream in a separate process, so that its memory is not the server's.

Run as `python -m tests.load.vendor`: prints the base URL of ElevenLabs, and ends when its stdin ends. The response to a
request whose audio or text contains `together=N` waits half way until there are N such requests.
"""

from __future__ import annotations

import asyncio
import re

from pomelo.testing import FaultUpstream, Gate, Received, Reply, Script, Speech, Transcript, VoiceList
from tests.load.child_process import print_line, stdin_end

SIZE = 10 * 1024 * 1024
"""Bytes of the audio of a response."""

PACKET = 16 * 1024
MAX_SECONDS = 1800.0
"""Seconds after which the process ends in any case."""

_TOGETHER = re.compile(r"together=(\d+) run=(\w+)")


class BarrierGate(Gate):
    """A gate that opens when `count` responses wait at it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._missing = count

    async def pass_through(self) -> None:
        self._missing -= 1
        if self._missing <= 0:
            self.open()
        await super().pass_through()


def together() -> Script:
    """A script that makes each response wait for the others of its run."""
    gates: dict[str, BarrierGate] = {}

    def script(received: Received) -> Reply:
        if received.path.endswith("/voices"):
            return VoiceList()(received)
        text = received.body["text"] if received.body else _part_head(received)
        match = _TOGETHER.search(text)
        assert match is not None, text
        gate = gates.setdefault(match[2], BarrierGate(int(match[1])))
        if received.form is not None:
            return Transcript(at={0: gate})(received)
        return Speech(size=SIZE, packet=PACKET, at={1: gate})(received)

    return script


def _part_head(received: Received) -> str:
    return next(part.head.decode("latin-1") for part in received.form or () if part.filename is not None)


async def _main() -> None:
    async with FaultUpstream() as upstream:
        upstream.default = together()
        print_line(upstream.elevenlabs_base_url)
        await asyncio.wait([stdin_end()], timeout=MAX_SECONDS)


if __name__ == "__main__":
    asyncio.run(_main())
