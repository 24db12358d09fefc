"""Measures the length of callers' audio with a demuxer in subprocesses (`pomelo.media.demux`).

A task's price and reservation depend on the length, so the audio data is measured and no header is trusted. A
process that takes too much time or memory is killed; audio that can't be measured is charged by its bytes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from pomelo import install_command
from pomelo.media import audio as samples
from pomelo.media.audio import AudioSource
from pomelo.media.content_types import UNKNOWN
from pomelo.runtime.process import shielded

log = logging.getLogger("pomelo.media")

MAX_WORKERS = 2
"""Demuxer processes; each is started on demand."""

TIMEOUT = 5.0
"""Seconds for measuring one audio file; then its process is killed."""

START_TIMEOUT = 20.0

_MAX_FILES_PER_WORKER = 2_000
"""Audio files after which a process is replaced, so that a leak in native code stays small."""

_INHERITED = ("PATH", "PYTHON", "LD_", "LANG", "LC_", "TMP")
"""Beginnings of the names of the variables that a process gets: the others may be secrets."""

_CONTENT_TYPES = {
    "aac": "audio/aac",
    "aiff": "audio/aiff",
    "asf": "video/x-ms-wmv",
    "avi": "video/x-msvideo",
    "flac": "audio/flac",
    "flv": "video/x-flv",
    "matroska": "audio/webm",
    "mov": "audio/mp4",
    "mp3": "audio/mpeg",
    "mpeg": "video/mpeg",
    "mpegts": "video/mpeg",
    "ogg": "audio/ogg",
    "wav": "audio/wav",
}
"""Name of a demuxer -> the media type of what it reads, as vendors list the types that they take."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The length in milliseconds, 0 if it can't be measured, and the media type of the bytes."""

    ms: int
    content_type: str


class Measurer:
    """Measures audio in at most `workers` processes. Create and close it in the running event loop.

    `timeout` is in seconds.
    """

    def __init__(self, *, workers: int = MAX_WORKERS, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        self._idle: list[_Worker] = []
        self._free_workers = asyncio.Semaphore(workers)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By account, while its audio is measured or waits for that."""
        self._av_missing = False

    async def measure(self, audio: AudioSource, account: str = "", request_id: str = "") -> Measured:
        """The length of `audio`, and its media type. `request_id` is for log lines.

        The files of one account are measured one at a time, so slow ones do not delay other accounts.
        """
        content_type = audio.content_type
        sample_format = samples.sample_format(content_type)
        result = None
        if audio.size and not self._av_missing:
            lock = self._locks.setdefault(account, asyncio.Lock())
            async with lock, self._free_workers:
                result = await self._request(audio, sample_format is not None, request_id)
        ms, name = result or (0, "")
        if name:
            # The given media type may be the caller's, or that of an ID3 tag, which may be before any format.
            return Measured(ms, _CONTENT_TYPES.get(name, UNKNOWN))
        if sample_format is None:
            return Measured(ms, content_type)
        if result is None and audio.size:
            return Measured(0, content_type)  # a declared type must not make unmeasurable audio cheaper
        return Measured(max(ms, -(-audio.size * 1000 // (sample_format[0] * sample_format[1]))), content_type)

    async def aclose(self) -> None:
        for worker in self._idle:
            await worker.end()
        self._idle.clear()

    async def _request(self, audio: AudioSource, raw: bool, request_id: str) -> tuple[int, str] | None:
        """The demuxer's answer; None if it failed."""
        worker = self._idle.pop() if self._idle else None
        extra = {"fields": {"request_id": request_id}} if request_id else {}
        try:
            if worker is None or not worker.alive:
                worker = await _Worker.start()
            async with asyncio.timeout(self._timeout):
                answer = await worker.request(audio, raw)
        except TimeoutError:
            log.warning(
                "audio of %d bytes could not be measured within %g s", audio.size, self._timeout, extra=extra
            )
        except (EOFError, OSError, ValueError) as error:
            log.warning(
                "audio of %d bytes could not be measured: %s", audio.size, type(error).__name__, extra=extra
            )
        except _AvMissingError:
            self._av_missing = True
            log.warning(
                "PyAV is not installed, so audio can't be measured and its maximum cost is reserved. Run: %s",
                install_command("sandbox"),
            )
        else:
            if worker.served < _MAX_FILES_PER_WORKER:
                self._idle.append(worker)
                worker = None
            return answer
        finally:
            if worker is not None:
                await shielded(asyncio.ensure_future(worker.end()))
        return None


class _AvMissingError(Exception):
    """PyAV is not installed."""


class _Worker:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.served = 0

    @classmethod
    async def start(cls) -> _Worker:
        """Starts a process and waits until it is ready.

        Raises:
            _AvMissingError: PyAV is not installed.
            OSError, EOFError, TimeoutError: the process did not start.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # else a file in the current folder could replace a module, such as av.py
            "-m",
            "pomelo.media.demux",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # only the server handles Ctrl-C in a terminal
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                if not (await worker._line()).get("ready"):
                    raise _AvMissingError
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def request(self, audio: AudioSource, raw: bool) -> tuple[int, str]:
        """The length in milliseconds and the format's name; with `raw` (declared as bare samples), the name
        is empty unless the format is certain.

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
        """Kills the process and waits for its end."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _line(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        line = await stdout.readline()
        if not line:
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer


def _environment() -> dict[str, str]:
    """The variables of a process, which imports from the same folders as this one."""
    inherited = {name: value for name, value in os.environ.items() if name.startswith(_INHERITED)}
    return inherited | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
