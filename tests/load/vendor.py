"""The playing vendors in a process of their own, so that their memory is nobody else's.

Run as `python -m tests.load.vendor`: prints where it listens, and ends when its stdin does. A request whose
sound or text has `together=N` in it is held in the middle until N of them are there.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pomelo.testing import FaultUpstream, Gate, Received, Reply, Script, Speech, Transcript, VoiceList

SIZE = 10 * 1024 * 1024
"""Bytes of a sound that it makes."""

PACKET = 16 * 1024
MOST_SECONDS = 1800.0
"""It ends after this long, whatever happens."""

_TOGETHER = re.compile(r"together=(\d+) run=(\w+)")


class Meeting(Gate):
    """A gate that opens when so many have come to it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._missing = count

    async def pass_through(self) -> None:
        """Waits here for the others."""
        self._missing -= 1
        if self._missing <= 0:
            self.open()
        await super().pass_through()


def together() -> Script:
    """A script for every request: meets the others, then answers as the vendor does."""
    meetings: dict[str, Meeting] = {}

    def script(received: Received) -> Reply:
        if received.path.endswith("/voices"):
            return VoiceList()(received)
        said = received.body["text"] if received.body else _head(received)
        match = _TOGETHER.search(said)
        assert match is not None, said
        meeting = meetings.setdefault(match[2], Meeting(int(match[1])))
        if received.form is not None:
            return Transcript(at={0: meeting})(received)
        return Speech(size=SIZE, packet=PACKET, at={1: meeting})(received)

    return script


def _head(received: Received) -> str:
    return next(part.head.decode("latin-1") for part in received.form or () if part.filename is not None)


@asynccontextmanager
async def vendor(folder: Path) -> AsyncIterator[str]:
    """Starts the process; gives the base URL of its ElevenLabs, and ends it."""
    with (folder / "vendor").open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.load.vendor",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            cwd=Path(__file__).parents[2],
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            yield (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        await process.wait()


async def _main() -> None:
    async with FaultUpstream() as upstream:
        upstream.default = together()
        sys.stdout.write(upstream.elevenlabs_base_url + "\n")
        sys.stdout.flush()
        ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await asyncio.wait([ended], timeout=MOST_SECONDS)


if __name__ == "__main__":
    asyncio.run(_main())
