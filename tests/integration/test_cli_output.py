"""The output of `pomelo run`: files that are opened before the task costs anything, links, and large files."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from pomelo.secrets import DATABASE
from tests.integration.commands import CommandResult, assert_refused, names, pomelo
from tests.serving import Served

OPTION = pytest.mark.parametrize("option", ["--stream", "--no-stream"])
TTS = ("-m", "eleven-labs-tts")
LARGE = ("A long story of a red kite. " * 120, *TTS, "-p", "output_format=wav_44100")
"""Speech of more than the 16 MiB that a response may have."""

Command = Callable[..., Awaitable[CommandResult]]


@pytest.fixture
def variables(served: Served) -> dict[str, str]:
    """The settings of the server."""
    return {"POMELO_DATA": str(served.data), "POMELO_GRPC": f"127.0.0.1:{served.grpc_port}"}


@pytest.fixture
def command(folder: Path, variables: dict[str, str]) -> Command:
    """Runs commands in an empty folder with the settings of the server."""
    return partial(pomelo, folder, **variables)


def count_tasks(served: Served) -> int:
    """Returns how many tasks the server has billed."""
    with closing(sqlite3.connect(served.data / DATABASE)) as database:
        (count,) = database.execute("SELECT count(*) FROM usage").fetchone()
    assert isinstance(count, int)
    return count


@OPTION
@pytest.mark.parametrize("name", ["/proc/kite.png", "n" * 254])
async def test_a_file_that_can_not_be_written_is_refused_before_the_task_costs_anything(
    served: Served, command: Command, folder: Path, name: str, option: str
) -> None:
    before = count_tasks(served)
    for arguments in (("a kite", "-m", "flux-1-pro"), ("Hello", *TTS), ("Hello",)):
        assert_refused(await command("run", *arguments, "--out", name, option), f"{name}: ")
    assert count_tasks(served) == before
    assert names(folder) == []


@OPTION
async def test_media_are_refused_before_they_cost_anything_in_a_folder_that_can_not_be_written(
    served: Served, variables: dict[str, str], option: str
) -> None:
    before = count_tasks(served)
    for arguments in (("Hello", *TTS), ("a kite", "-m", "flux-1-pro")):
        refused = await pomelo(Path("/proc"), "run", *arguments, option, **variables)
        assert_refused(refused, "/proc: No such file or directory. Name a file with --out")
    assert count_tasks(served) == before
    link = await pomelo(Path("/proc"), "run", *arguments, "-p", "delivery=link", option, **variables)
    text = await pomelo(Path("/proc"), "run", "Hello", option, **variables)
    assert (link.status, text.status) == (0, 0)


@OPTION
@pytest.mark.parametrize("out", [(), ("--out", "old.png")])
async def test_a_refused_task_leaves_the_files_as_they_were(
    command: Command, folder: Path, option: str, out: tuple[str, ...]
) -> None:
    (folder / "old.png").write_bytes(b"old")
    for model in ("gpt-4", "flux-1-pro", "eleven-labs-tts"):
        refused = await command("run", "[[error:content_policy_violation]]", "-m", model, option, *out)
        assert_refused(refused, "content_policy_violation: ")
    assert names(folder) == ["old.png"]
    assert (folder / "old.png").read_bytes() == b"old"


async def test_a_file_that_is_too_large_for_a_response_is_downloaded(command: Command, folder: Path) -> None:
    for option in ("--stream", "--no-stream"):
        result = await command("run", *LARGE, "--out", f"{option}.wav", option)
        assert (result.status, result.out, result.error) == (0, f"{option}.wav\n", "")
    expected = (folder / "--stream.wav").read_bytes()
    assert len(expected) > 16 * 1024 * 1024
    assert (folder / "--no-stream.wav").read_bytes() == expected
    assert (await command("run", *LARGE, "--no-stream", "--out", "-")).raw == expected
    unnamed = await command("run", *LARGE, "--no-stream")
    assert (folder / unnamed.out.strip()).read_bytes() == expected


async def test_the_link_of_a_file_that_can_not_be_written_is_printed(
    served: Served, command: Command
) -> None:
    result = await command("run", *LARGE, "--no-stream", "--out", "/dev/full")
    note, error = result.error.splitlines()
    assert note.startswith(f"(The file can be downloaded for an hour: {served.url}/")
    assert (result.status, error) == (1, "pomelo: /dev/full: No space left on device")


@OPTION
@pytest.mark.parametrize("model", ["flux-1-dev", "eleven-labs-tts"])
async def test_a_link_and_a_file_are_written_as_requested(
    served: Served,
    command: Command,
    folder: Path,
    http: aiohttp.ClientSession,
    model: str,
    option: str,
) -> None:
    task = ("run", "a kite", "-m", model, option)
    link = await command(*task, "-p", "delivery=link")
    assert (link.status, names(folder)) == (0, [])
    async with http.get(link.out.strip()) as response:
        expected = await response.read()
    for delivery in ("link", "both"):
        both = await command(*task, "-p", f"delivery={delivery}", "--out", delivery)
        url, name = both.out.splitlines()
        assert url.startswith(f"{served.url}/")
        assert (name, (folder / name).read_bytes()) == (delivery, expected)
    stdout = await command(*task, "-p", "delivery=both", "--out", "-")
    assert (stdout.raw, stdout.error.startswith(f"{served.url}/")) == (expected, True)
    only = await command(*task, "-p", "delivery=link", "--out", "-")
    assert only.out.startswith(f"{served.url}/")
    assert len(only.out.splitlines()) == 1


@pytest.mark.parametrize("text", ["5", "true", "null", "NaN", '{"a": 1}', "END", '"END"', '["5", "6"]'])
async def test_a_list_of_texts_takes_a_text_that_looks_like_another_value(
    command: Command, text: str
) -> None:
    result = await command("run", "Hello", "-p", f"stop={text}")
    assert (result.status, result.error) == (0, "(Adjusted to what the model takes: no stop.)\n")
