"""How long a caller's audio is, measured by a demuxer in processes of its own (`pomelo.media.demux`).

A task's price and hold depend on it, so it measures the audio data and trusts no header. A process
that takes too long or too much memory is killed; audio that can't be measured is charged by its
bytes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

from pomelo import install_command
from pomelo.media import audio as samples
from pomelo.media.audio import AudioSource

log = logging.getLogger("pomelo.measure")

WORKERS = 2
"""The most demuxer processes; each is started when audio first needs it."""

TIMEOUT = 5.0
"""Seconds that measuring one audio file may take; then its process is killed."""

START_TIMEOUT = 20.0

_RECYCLE = 2_000
"""Audio files after which a process is replaced: a leak in native code stays small."""

_TYPES = {
    "flac": "audio/flac",
    "mov": "audio/mp4",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "wav": "audio/wav",
}
_ANY = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Measured:
    """The length in milliseconds (0: it can't be measured), and the media type of the bytes."""

    ms: int
    content_type: str


class Measurer:
    """Measures audio. `timeout` is in seconds. Create and close it in the running event loop."""

    def __init__(self, *, workers: int = WORKERS, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        self._idle: list[_Worker] = []
        self._places = asyncio.Semaphore(workers)
        self._turns: dict[str, _Turn] = {}
        self._missing = False

    async def measure(self, audio: AudioSource, account: str = "") -> Measured:
        """How long `audio` is.

        One account's files are measured one after another, so slow ones do not delay other
        accounts.

        Raises:
            PomeloError: store_unavailable, the file can't be read.
        """
        content_type = audio.content_type
        bare = samples.raw(content_type)
        found = None
        if audio.size and not self._missing:
            found = await self._in_turn(audio, account, bare is not None)
        if bare is None:
            return Measured(found[0] if found else 0, content_type)
        if found is None and audio.size:
            return Measured(0, content_type)  # a label must not make cheaper what could not be measured
        ms, name = found or (0, "")
        if name:
            return Measured(ms, _TYPES.get(name, _ANY))
        return Measured(max(ms, -(-audio.size * 1000 // (bare[0] * bare[1]))), content_type)

    async def aclose(self) -> None:
        """Ends the processes."""
        for worker in self._idle:
            await worker.end()
        self._idle.clear()

    async def _in_turn(self, audio: AudioSource, account: str, raw: bool) -> tuple[int, str] | None:
        turn = self._turns.setdefault(account, _Turn())
        turn.waiting += 1
        try:
            async with turn.lock, self._places:
                return await self._ask(audio, raw)
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                del self._turns[account]

    async def _ask(self, audio: AudioSource, raw: bool) -> tuple[int, str] | None:
        """What the demuxer found; None if it failed."""
        worker = self._idle.pop() if self._idle else None
        try:
            if worker is None or not worker.alive:
                worker = await _Worker.start()
            async with asyncio.timeout(self._timeout):
                answer = await worker.ask(audio, raw)
        except TimeoutError:
            log.warning("audio of %d bytes could not be measured within %g s", audio.size, self._timeout)
        except (EOFError, OSError, ValueError) as error:
            log.warning("audio of %d bytes could not be measured: %s", audio.size, type(error).__name__)
        except _MissingError:
            self._missing = True
            log.warning(
                "PyAV is not installed, so audio can't be measured and its maximum cost is reserved. Run: %s",
                install_command("sandbox"),
            )
        else:
            if worker.served < _RECYCLE:
                self._idle.append(worker)
                worker = None
            return answer
        finally:
            if worker is not None:
                await asyncio.shield(worker.end())
        return None


class _Turn:
    """An account's audio: one at a time."""

    __slots__ = ("lock", "waiting")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class _MissingError(Exception):
    """The demuxer is not installed."""


class _Worker:
    """One demuxer process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.served = 0

    @classmethod
    async def start(cls) -> _Worker:
        """Starts a process; returns when it is ready.

        Raises:
            _MissingError: the demuxer is not installed; OSError, EOFError, TimeoutError: no start.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pomelo.media.demux",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # only the server handles Ctrl-C in a terminal
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                if not (await worker._line()).get("ready"):
                    raise _MissingError
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.returncode is None

    async def ask(self, audio: AudioSource, raw: bool) -> tuple[int, str]:
        """The length in milliseconds and the format's name; the name of what is labelled as samples is empty
        unless the format is certain.

        Raises:
            OSError, EOFError, ValueError: the process died.
        """
        self.served += 1
        stdin = self._process.stdin
        assert stdin is not None
        if audio.path is not None:
            stdin.write(json.dumps({"path": str(audio.path.absolute()), "raw": raw}).encode() + b"\n")
        else:
            stdin.write(json.dumps({"size": audio.size, "raw": raw}).encode() + b"\n")
            stdin.write(audio.data)
        await stdin.drain()
        answer = await self._line()
        return int(answer["ms"]), str(answer["format"])

    async def end(self) -> None:
        """Kills it, and waits for its end."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _line(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        line = await stdout.readline()
        if not line:
            raise EOFError
        found: dict[str, Any] = json.loads(line)
        return found
