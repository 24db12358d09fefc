"""`pomelo run` with a server: requests, printed output, and files."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shlex
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import av
import pytest

from pomelo.cli.sink import Sink
from pomelo.secrets import DATABASE
from tests.docs.blocks import ROOT
from tests.integration.commands import (
    CommandResult,
    assert_refused,
    environment,
    free_addresses,
    names,
    pomelo,
    start_server,
)
from tests.serving import Served

OPTION = pytest.mark.parametrize("option", ["--stream", "--no-stream"])
TTS, STS, STT = ("-m", "eleven-labs-tts"), ("-m", "eleven-labs-sts"), ("-m", "eleven-labs-stt")

Command = Callable[..., Awaitable[CommandResult]]


@pytest.fixture
def command(served: Served, folder: Path) -> Command:
    """Runs commands in an empty folder with the settings of the server."""
    grpc = f"127.0.0.1:{served.grpc_port}"
    return partial(pomelo, folder, POMELO_DATA=str(served.data), POMELO_GRPC=grpc)


@OPTION
async def test_text_is_printed_with_a_final_newline_and_nothing_else(command: Command, option: str) -> None:
    result = await command("run", "Hello", "--model", "gpt-4", option)
    assert (result.status, result.error) == (0, "")
    assert '"Hello"' in result.out
    assert result.out.endswith("\n")
    assert not result.out.endswith("\n\n")


@OPTION
async def test_tool_calls_are_printed_as_lines_of_json(command: Command, option: str) -> None:
    tools = '[{"name": "now"}, {"name": "say", "parametersJson": "{\\"required\\": [\\"a\\"]}"}]'
    result = await command("run", "[[calls:2]]", "-p", f"tools={tools}", option)
    assert (result.status, result.error) == (0, "")
    calls = [json.loads(line) for line in result.out.splitlines()]
    assert [(call["name"], call["arguments"]) for call in calls] == [("now", "{}"), ("say", '{"a": "text"}')]
    assert all(call["id"].startswith("call_") for call in calls)


async def test_fields_are_set_as_the_page_of_the_command_line_says(command: Command) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    limit, tools, form = [shlex.split(each) for each in re.findall(r"`(-p [^`]+[0'])`", page)]
    assert len((await command("run", "Hello", *limit)).out.split()) <= int(limit[1].partition("=")[2])
    assert json.loads((await command("run", "Hello", *tools)).out)["name"] == "weather"
    assert "Hello" in json.loads((await command("run", "Hello", *form)).out)["answer"]


async def test_text_is_read_from_a_file_or_stdin_and_written_to_a_file(
    command: Command, folder: Path
) -> None:
    (folder / "question.txt").write_text("From a file")
    result = await command("run", "-m", "gpt-4", "-f", "question.txt", "-o", "answer.txt")
    assert (result.status, result.out) == (0, "answer.txt\n")
    assert "From a file" in (folder / "answer.txt").read_text()
    for arguments in (("run", "-"), ("run", "--model", "gpt-4")):
        assert "From stdin" in (await command(*arguments, stdin="From stdin")).out


async def test_text_is_read_as_utf_8_in_every_locale_and_without_its_byte_order_mark(
    command: Command, folder: Path
) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (folder / "question.txt").write_text("\ufeffLöwe", "utf-8")
    for given in (("-f", "question.txt"), ("-",)):
        result = await command("run", *given, stdin="\ufeffLöwe", **locale)
        assert (result.status, '"Löwe"' in result.out) == (0, True)


async def test_truncated_text_is_noted_on_stderr(command: Command) -> None:
    result = await command("run", "Hello", "-p", "max_tokens=2", "--stream")
    assert "max_tokens" in result.error
    assert len(result.out.split()) <= 2


@OPTION
async def test_an_image_is_written_under_its_id_with_the_given_fields(
    command: Command, folder: Path, option: str
) -> None:
    fields = [f"-p{field}" for field in ("width=128", "height=64", "output_format=webp")]
    result = await command("run", "a tree", "-m", "flux-1-schnell", option, *fields)
    assert result.status == 0
    path = folder / result.out.strip()
    assert path.name.startswith("img_")
    assert path.suffix == ".webp"
    with av.open(BytesIO(path.read_bytes()), "r") as image:
        frame = next(image.decode(video=0))
        assert (frame.width, frame.height) == (128, 64)
    assert names(folder) == [path.name]


async def test_speech_is_generated_converted_and_transcribed(command: Command, folder: Path) -> None:
    generated = await command("run", "Good morning", *TTS, "-o", "a.mp3", "--stream")
    assert (generated.status, generated.out) == (0, "a.mp3\n")
    whole = await command("run", "Good morning", *TTS, "-o", "-", "--no-stream")
    assert whole.raw == (folder / "a.mp3").read_bytes()
    converted = await command("run", *STS, "-f", "a.mp3", "--voice", "bella")
    assert converted.status == 0
    assert (folder / converted.out.strip()).suffix == ".mp3"
    transcribed = await command("run", *STT, "-f", "a.mp3")
    assert transcribed.out.lower().startswith("good morning")


@OPTION
@pytest.mark.parametrize(
    ("model", "name", "head"),
    [
        ("eleven-labs-tts", "a.wav", b"RIFF"),
        ("eleven-labs-tts", "a.OGG", b"OggS"),
        ("eleven-labs-tts", "a.mp3", b"ID3"),
        ("eleven-labs-tts", "a", b"ID3"),
        ("flux-1-pro", "a.jpg", b"\xff\xd8\xff"),
        ("flux-1-pro", "a.png", b"\x89PNG"),
        ("flux-1-pro", "a.mp3", b"\x89PNG"),  # not the extension of an image
    ],
)
async def test_a_file_has_the_format_of_its_extension(
    command: Command, folder: Path, model: str, name: str, head: bytes, option: str
) -> None:
    result = await command("run", "a kite", "-m", model, "-o", name, option)
    assert (result.status, result.out, result.error) == (0, f"{name}\n", "")
    assert (folder / name).read_bytes().startswith(head)


async def test_a_format_that_the_extension_of_the_file_contradicts_is_refused(
    command: Command, folder: Path
) -> None:
    for model, name, given, codec in (
        ("eleven-labs-tts", "a.wav", "mp3_44100_64", "mp3"),
        ("flux-1-pro", "a.png", "webp", "webp"),
    ):
        task = ("run", "[[error:rate_limit_exceeded]]", "-m", model, "-p", f"output_format={given}")
        message = f"--out {name}: output_format is {codec}. Change one of them, or leave it out"
        assert_refused(await command(*task, "-o", name), message)
    assert names(folder) == []
    fitting = await command("run", "a kite", *TTS, "-p", "output_format=wav_8000", "-o", "a.wav")
    assert (fitting.status, (folder / "a.wav").read_bytes()[24:28]) == (0, (8000).to_bytes(4, "little"))


async def test_audio_too_large_for_a_message_is_uploaded_first(command: Command, folder: Path) -> None:
    fields = ["-p", "output_format=wav_44100"]
    generated = await command("run", "A long story. " * 80, *TTS, "-o", "a.wav", *fields)
    assert generated.status == 0
    assert (folder / "a.wav").stat().st_size > 4 * 1024 * 1024
    transcribed = await command("run", *STT, "-f", "a.wav")
    assert (transcribed.status, transcribed.error) == (0, "")
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    async with asyncio.timeout(20):
        audio = (folder / "a.wav").read_bytes()
        piped, _ = await asyncio.gather(
            command("run", *STT, "-f", "pipe"), asyncio.to_thread(pipe.write_bytes, audio)
        )
    assert (piped.status, piped.out) == (0, transcribed.out)


async def test_audio_above_the_limit_of_the_settings_is_uploaded_first(tmp_path: Path) -> None:
    settings = free_addresses() | {"POMELO_INLINE_LIMIT": "1kB"}
    async with start_server(tmp_path, **settings):
        arguments = ("Good morning", *TTS, "-o", "a.mp3")
        assert (await pomelo(tmp_path, "run", *arguments, **settings)).status == 0
        assert (tmp_path / "a.mp3").stat().st_size > 1_000
        transcribed = await pomelo(tmp_path, "run", *STT, "-f", "a.mp3", **settings)
        assert (transcribed.status, transcribed.error) == (0, "")


async def test_a_link_is_printed_on_request(served: Served, command: Command, folder: Path) -> None:
    result = await command("run", "a tree", "-m", "flux-1-dev", "-p", "delivery=link")
    assert result.out.startswith(f"{served.url}/")
    assert names(folder) == []


@OPTION
async def test_labels_are_kept_in_the_usage_record(served: Served, command: Command, option: str) -> None:
    labels = ("-p", f"user=cli{option}", "-p", 'metadata={"project": "kites"}')
    for model in ("gpt-4", "flux-1-dev"):
        assert (await command("run", "Hello", "-m", model, option, *labels)).status == 0
    with closing(sqlite3.connect(served.data / DATABASE)) as database:
        kept = database.execute("SELECT metadata FROM usage WHERE user = ?", [f"cli{option}"]).fetchall()
    assert [json.loads(metadata) for (metadata,) in kept] == [{"project": "kites"}] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "x", "-m", "nothing"), "unsupported_model: Unsupported task type: nothing"),
        (("run", "x", "-p", "temperature=9"), "invalid_parameter: "),
        (("run", "x", "-p", "nothing=1"), "--param nothing: there is no such field"),
        (
            ("run", "x", "-p", "nothing=1"),
            "Fields: delivery, format, frequency_penalty, max_tokens, messages, metadata, ",
        ),
        (("run", "x", "-p", "delivery=b64_json"), "not one of link, inline, both"),
        (("run", "x", "-p", "metadata=kites"), "'kites' is not a value of this field"),
        (("run", "x", "-p", 'metadata={"project": 7}'), "is not a value of this field"),
        (("run", "x", "-p", "max_tokens=many"), "--param max_tokens: 'many' is not a value"),
        (("run", "x", "-p", "max_tokens"), "write NAME=VALUE"),
        (("run", "x", "-m", "flux-1-pro", "-p", "output_format=bmp"), "not one of png, jpeg, webp"),
        (("run",), "takes a text"),
        (("run", "x", *STT), "takes audio"),
        (("run", *STT, "-f", "none.mp3"), "none.mp3: No such file"),
        (("run", "x", "--key", "pml_test_wrong"), "invalid_api_key: "),
        (("run", "[[error:rate_limit_exceeded]]"), "rate_limit_exceeded: Rate limit exceeded. Reset at"),
        (("models", "--key", "pml_test_wrong"), "invalid_api_key: "),
        (("run", "\udcff"), "\\udcff is not UTF-8 text"),
        (("run", "x", "-m", "\udcff"), "\\udcff is not UTF-8 text"),
        (("run", "x", "-p", "\udcff=1"), "--param \\udcff: there is no such field"),
        (("run", "x", "-p", "user=\udcff"), "is not a value of this field"),
        (("accounts", "show", "\udcff"), "\\udcff is not UTF-8 text"),
    ],
)
async def test_an_error_is_one_line_on_stderr_and_status_1(
    command: Command, arguments: tuple[str, ...], message: str
) -> None:
    assert_refused(await command(*arguments), message)


async def test_a_truncated_stream_prints_what_arrived_and_fails(command: Command) -> None:
    result = await command("run", "Hello [[cut]]", "--stream")
    assert result.status == 1
    assert result.out.strip()
    assert result.error.startswith("pomelo: provider_")


async def test_truncated_audio_leaves_no_file(command: Command, folder: Path) -> None:
    result = await command("run", "Hello [[cut]] there", *TTS, "--stream", "-o", "a.mp3")
    assert result.status == 1
    assert names(folder) == []


async def test_an_output_directory_is_refused_before_the_task_runs(command: Command, folder: Path) -> None:
    (folder / "there").mkdir()
    for out, message in (("there", "this is a directory"), ("none/a.png", "there is no directory none")):
        result = await command("run", "[[error:rate_limit_exceeded]]", "-m", "flux-1-dev", "-o", out)
        assert (result.status, result.out) == (1, "")
        assert f"--out {out}: {message}" in result.error
    assert names(folder) == ["there"]


def test_a_file_that_can_not_be_renamed_leaves_no_partial_file_and_the_error_has_its_name(
    folder: Path,
) -> None:
    sink = Sink(folder / "a.txt")
    sink.write(b"x")
    (folder / "a.txt").mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        sink.commit()
    assert (caught.value.filename, caught.value.filename2) == (str(folder / "a.txt"), None)
    assert names(folder) == ["a.txt"]
    with pytest.raises(OSError, match="too long") as caught:
        Sink(folder / ("n" * 254))
    assert caught.value.filename == str(folder / ("n" * 254))


async def test_a_pipe_is_written_to_and_stays_a_pipe(command: Command, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    reading = asyncio.create_task(asyncio.to_thread((folder / "pipe").read_bytes))
    result = await command("run", "Hello", "-o", "pipe")
    assert result.status == 0
    assert b"Hello" in await reading
    assert (folder / "pipe").is_fifo()


async def test_a_missing_server_and_a_missing_key_are_reported(command: Command, folder: Path) -> None:
    no_server = await command("run", "x", "--target", "127.0.0.1:1")
    assert "No server answers at 127.0.0.1:1" in no_server.error
    no_key = await command("run", "x", POMELO_DATA=str(folder / "none"))
    assert "POMELO_KEY" in no_key.error
    assert (no_server.status, no_key.status) == (1, 1)


async def test_a_key_of_the_environment_overrides_the_development_key(
    served: Served, command: Command, folder: Path
) -> None:
    result = await command("models", POMELO_KEY="pml_test_wrong")
    assert "invalid_api_key" in result.error
    where = f"The key is that of --key, else of POMELO_KEY, else of {served.data / 'test-key'}\n"
    assert result.error.endswith(where)
    assert (await command("run", "Hi", POMELO_KEY="pml_test_wrong")).error.endswith(where)
    good = await command("models", POMELO_KEY=served.key, POMELO_DATA=str(folder / "none"))
    assert good.status == 0


async def test_on_a_terminal_text_is_streamed_and_not_overwritten_by_progress(
    served: Served, command: Command, folder: Path
) -> None:
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "pomelo.cli", "run", "Hello"),
        cwd=folder,
        env=environment(folder, POMELO_DATA=str(served.data), POMELO_GRPC=f"127.0.0.1:{served.grpc_port}"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    async with asyncio.timeout(60):
        seen = await asyncio.to_thread(_read_all, master)
        assert await process.wait() == 0
    os.close(master)
    progress, _, text = seen.rpartition("\x1b[K")
    assert "Working" in progress
    assert '"Hello"' in text
    assert text.endswith("\r\n")


def _read_all(terminal: int) -> str:
    """Returns the output of a terminal until its last writer closes it."""
    pieces = []
    with suppress(OSError):  # how Linux reports the end
        while piece := os.read(terminal, 4096):
            pieces.append(piece)
    return b"".join(pieces).decode()


@OPTION
@pytest.mark.parametrize(
    ("model", "field", "note"),
    [
        ("gpt-4", "stop=END", "(Adjusted to what the model takes: no stop.)\n"),
        ("flux-1-pro", "width=200", "(Adjusted to what the model takes: width=256.)\n"),
        (
            "eleven-labs-tts",
            'voice_settings={"speed": 4}',
            "(Adjusted to what the model takes: voice_settings.speed=1.2.)\n",
        ),
    ],
)
async def test_adjusted_fields_are_noted_on_stderr(
    command: Command, model: str, field: str, note: str, option: str
) -> None:
    result = await command("run", "Hi", "-m", model, "-p", field, option)
    assert (result.status, result.error) == (0, note)
