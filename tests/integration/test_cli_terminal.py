"""What commands print on a terminal of 80 columns, and the completion of shells."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import sys
import termios
from pathlib import Path

import aiohttp
import pytest
from rich.cells import cell_len

from tests.driver import TaskRequest
from tests.integration.commands import create_key, environment, output_of, pomelo, pomelo_json
from tests.rest_driver import RestDriver
from tests.serving import Served
from tests.tasks import text_body

WIDTH = 80


async def on_terminal(folder: Path, *arguments: str, **variables: str) -> str:
    """Runs a command on a terminal of WIDTH columns, and returns all that it shows."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pomelo.cli", *arguments),
        cwd=folder,
        env=environment(folder, **variables),
        stdin=end,
        stdout=end,
        stderr=end,
    )
    os.close(end)
    shown = bytearray()

    def read() -> None:
        try:
            while part := os.read(terminal, 65536):
                shown.extend(part)
        except OSError:
            pass  # the command has ended

    async with asyncio.timeout(60):
        await asyncio.to_thread(read)
        assert await process.wait() == 0, shown.decode()
    os.close(terminal)
    return shown.decode().replace("\r\n", "\n")


def assert_fits(shown: str) -> None:
    """Asserts that no line is wider than the terminal."""
    assert max(cell_len(line) for line in shown.splitlines()) <= WIDTH, shown


async def test_a_wide_table_leaves_columns_out_on_a_terminal_and_has_all_in_a_pipe(
    served: Served, http: aiohttp.ClientSession
) -> None:
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "narrow")).status == 0
    key = await create_key(folder, "narrow")
    assert (await RestDriver(http, served.url)(TaskRequest(text_body(), key))).status == 200
    shown = await on_terminal(folder, "usage", "--account", "narrow")
    assert_fits(shown)
    header, _, note = shown.splitlines()
    assert header.split()[0] == "TIME"
    assert {"CREDITS", "ID"} <= set(header.split())
    assert note == "(8 columns left out: widen the terminal, or use --json.)"
    piped = await pomelo(folder, "usage", "--account", "narrow")
    assert "CACHED" in piped.out
    assert piped.error == ""


async def test_long_cells_take_several_lines_on_a_terminal(served: Served) -> None:
    settings = {"POMELO_DATA": str(served.data), "POMELO_GRPC": f"127.0.0.1:{served.grpc_port}"}
    shown = await on_terminal(served.data.parent, "models", **settings)
    assert_fits(shown)
    assert "4/1M input tokens" in re.sub(r"\s+", " ", shown)
    piped = await pomelo(served.data.parent, "models", **settings)
    assert len(piped.out.splitlines()) == 15


async def test_the_progress_of_an_upload_is_shown_on_a_terminal_only(served: Served, tmp_path: Path) -> None:
    settings = {"POMELO_DATA": str(served.data), "POMELO_GRPC": f"127.0.0.1:{served.grpc_port}"}
    text, tts = "A long story. " * 80, ("-m", "eleven-labs-tts", "-p", "output_format=wav_44100")
    assert (await pomelo(tmp_path, "run", text, *tts, "-o", "a.wav", **settings)).status == 0
    command = ("run", "-m", "eleven-labs-stt", "-f", "a.wav")
    assert re.search(r"Uploading … \d+%", await on_terminal(tmp_path, *command, **settings))
    piped = await pomelo(tmp_path, *command, **settings)
    assert (piped.status, piped.error) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_a_shell_completes_commands(tmp_path: Path, shell: str) -> None:
    script = await pomelo(tmp_path, _POMELO_COMPLETE=f"source_{shell}")
    assert script.status == 0
    assert "_POMELO_COMPLETE=complete_" + shell in script.out
    if shell == "bash" and (bash := shutil.which("bash")):
        (tmp_path / "pomelo").write_text(f'#!/bin/sh\nexec {sys.executable} -m pomelo.cli "$@"\n')
        (tmp_path / "pomelo").chmod(0o700)
        lines = f'{script.out}\nCOMP_WORDS=(pomelo acc); COMP_CWORD=1; _pomelo_completion pomelo; echo "${{COMPREPLY[@]}}"'
        path = f"{tmp_path}:{os.environ['PATH']}"
        out = await output_of(bash, "--norc", "-c", lines, env=environment(tmp_path, PATH=path))
        assert out.split() == ["accounts"]


async def test_wide_characters_stay_in_their_columns(served: Served, http: aiohttp.ClientSession) -> None:
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "wide")).status == 0
    key = await create_key(folder, "wide")
    for user in ("東京都庁", "ada"):
        answer = await RestDriver(http, served.url)(TaskRequest(text_body(user=user), key))
        assert answer.status == 200
    lines = (await pomelo(folder, "usage", "--account", "wide", "--by", "user")).out.splitlines()
    starts = [re.match(r"\S+ +", line) for line in lines]
    assert [cell_len(start[0]) for start in starts if start] == [10] * 3


async def write_to(file: int, folder: Path, *arguments: str) -> tuple[int | None, str]:
    """Runs a command whose output goes to a file; returns its exit status and its errors."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pomelo.cli", *arguments),
        cwd=folder,
        env=environment(folder, PYTHONUNBUFFERED=""),
        stdout=file,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, error = await process.communicate()
    return process.returncode, error.decode()


LISTS = (
    ("accounts", "list"),
    ("accounts", "list", "--json"),
    ("usage", "--by", "account", "--format", "csv"),
)


@pytest.mark.parametrize("arguments", [*LISTS, ("--version",)], ids=" ".join)
async def test_output_that_cannot_be_written_ends_a_command_with_status_1(
    served: Served, http: aiohttp.ClientSession, arguments: tuple[str, ...]
) -> None:
    folder = served.data.parent
    key = await create_key(folder)
    assert (await RestDriver(http, served.url)(TaskRequest(text_body(), key))).status == 200
    full = os.open("/dev/full", os.O_WRONLY)
    assert await write_to(full, folder, *arguments) == (1, "pomelo: No space left on device\n")
    os.close(full)
    read, write = os.pipe()
    os.close(read)
    assert await write_to(write, folder, *arguments) == (1, "")  # as with `| head`
    os.close(write)


async def test_a_change_is_reported_even_if_the_output_cannot_be_written(command_folder: Path) -> None:
    """The credits would be granted twice, and the key would work although nobody has it."""
    folder = command_folder
    await create_key(folder)
    full = os.open("/dev/full", os.O_WRONLY)
    why = ", but the output can't be written: No space left on device"
    expected = f"pomelo: The account default was changed{why}\n"
    assert await write_to(full, folder, "accounts", "grant", "default", "10") == (1, expected)
    assert (await pomelo_json(folder, "accounts", "show", "default"))["live"]["granted"] == 10

    for options in ((), ("--json",)):
        status, error = await write_to(full, folder, "keys", "create", *options)
        key_id = (await pomelo_json(folder, "keys", "list"))[-1]["id"]
        remedy = f"pomelo keys rotate {key_id}"
        assert (status, error) == (1, f"pomelo: The key {key_id} was created{why}. Replace it: {remedy}\n")
        assert (await pomelo(folder, *remedy.split()[1:])).status == 0
        states = [key["state"] for key in await pomelo_json(folder, "keys", "list")]
        assert states[-2:] == ["revoked", "active"]
    os.close(full)


@pytest.mark.parametrize("arguments", LISTS, ids=" ".join)
async def test_a_command_without_an_output_does_its_work(served: Served, arguments: tuple[str, ...]) -> None:
    command = shlex.join([sys.executable, "-m", "pomelo.cli", *arguments])
    folder = served.data.parent
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f"{command} >&-"),
        cwd=folder,
        env=environment(folder),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, error = await process.communicate()
    assert (process.returncode, error) == (0, b"")
