"""`pomelo run` and `pomelo models` with a server: requests, printed output, and files."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path

import av
import pytest

from pomelo.cli.run import _Sink
from tests.integration.commands import CommandResult, environment, pomelo
from tests.serving import Served, serve


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A running server."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        yield process


async def run_command(
    served: Served, folder: Path, *arguments: str, stdin: bytes = b"", **variables: str
) -> CommandResult:
    """Runs a command with the settings of the server."""
    variables = {"POMELO_DATA": str(served.data), "POMELO_GRPC": f"127.0.0.1:{served.grpc_port}"} | variables
    return await pomelo(folder, *arguments, stdin=stdin, **variables)


@pytest.mark.parametrize("option", ["--stream", "--no-stream"])
async def test_text_is_printed_with_a_final_newline_and_nothing_else(served, tmp_path, option):
    result = await run_command(served, tmp_path, "run", "Hello", "--model", "gpt-4", option)
    assert (result.status, result.error) == (0, "")
    assert '"Hello"' in result.out
    assert result.out.endswith("\n")
    assert not result.out.endswith("\n\n")


async def test_text_is_read_from_a_file_or_stdin_and_written_to_a_file(served, tmp_path):
    (tmp_path / "question.txt").write_text("From a file")
    result = await run_command(
        served, tmp_path, "run", "-m", "gpt-4", "-f", "question.txt", "-o", "answer.txt"
    )
    assert (result.status, result.out) == (0, "answer.txt\n")
    assert "From a file" in (tmp_path / "answer.txt").read_text()
    assert "From stdin" in (await run_command(served, tmp_path, "run", "-", stdin=b"From stdin")).out


async def test_truncated_text_is_noted_on_stderr(served, tmp_path):
    result = await run_command(served, tmp_path, "run", "Hello", "-p", "max_tokens=2", "--stream")
    assert "max_tokens" in result.error
    assert len(result.out.split()) <= 2


@pytest.mark.parametrize("option", ["--stream", "--no-stream"])
async def test_an_image_is_written_under_its_id_with_the_given_fields(served, tmp_path, option):
    fields = [f"-p{field}" for field in ("width=128", "height=64", "output_format=webp")]
    result = await run_command(served, tmp_path, "run", "a tree", "-m", "flux-1-schnell", option, *fields)
    assert result.status == 0
    path = tmp_path / result.out.strip()
    assert path.name.startswith("img_")
    assert path.suffix == ".webp"
    with av.open(BytesIO(path.read_bytes())) as image:
        frame = next(image.decode(video=0))
        assert (frame.width, frame.height) == (128, 64)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


async def test_speech_is_generated_converted_and_transcribed(served, tmp_path):
    generated = await run_command(
        served, tmp_path, "run", "Good morning", "-m", "eleven-labs-tts", "-o", "a.mp3", "--stream"
    )
    assert (generated.status, generated.out) == (0, "a.mp3\n")
    whole = await run_command(
        served, tmp_path, "run", "Good morning", "-m", "eleven-labs-tts", "-o", "-", "--no-stream"
    )
    assert whole.raw == (tmp_path / "a.mp3").read_bytes()
    converted = await run_command(
        served, tmp_path, "run", "-m", "eleven-labs-sts", "-f", "a.mp3", "--voice", "bella"
    )
    assert converted.status == 0
    assert (tmp_path / converted.out.strip()).suffix == ".mp3"
    transcribed = await run_command(served, tmp_path, "run", "-m", "eleven-labs-stt", "-f", "a.mp3")
    assert transcribed.out.lower().startswith("good morning")


async def test_audio_too_large_for_a_message_is_uploaded_first(served, tmp_path):
    fields = ["-p", "output_format=wav_44100"]
    generated = await run_command(
        served, tmp_path, "run", "A long story. " * 80, "-m", "eleven-labs-tts", "-o", "a.wav", *fields
    )
    assert generated.status == 0
    assert (tmp_path / "a.wav").stat().st_size > 4 * 1024 * 1024
    transcribed = await run_command(served, tmp_path, "run", "-m", "eleven-labs-stt", "-f", "a.wav")
    assert (transcribed.status, transcribed.error) == (0, "")


async def test_a_link_is_printed_on_request(served, tmp_path):
    result = await run_command(
        served, tmp_path, "run", "a tree", "-m", "flux-1-dev", "-p", "response_format=url"
    )
    assert result.out.startswith(f"{served.url}/")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "x", "-m", "nothing"), "unsupported_model: Unsupported task type: nothing"),
        (("run", "x", "-p", "temperature=9"), "invalid_parameter: "),
        (("run", "x", "-p", "nothing=1"), "--param nothing: there is no such field"),
        (("run", "x", "-p", "max_tokens=many"), "--param max_tokens: 'many' is no value"),
        (("run", "x", "-p", "max_tokens"), "write NAME=VALUE"),
        (("run", "x", "-m", "flux-1-pro", "-p", "output_format=bmp"), "not one of png, jpeg, webp"),
        (("run",), "takes a text"),
        (("run", "x", "-m", "eleven-labs-stt"), "takes audio"),
        (("run", "-m", "eleven-labs-stt", "-f", "none.mp3"), "none.mp3: No such file"),
        (("run", "x", "--key", "pml_test_wrong"), "invalid_api_key: "),
        (("run", "[[error:rate_limit_exceeded]]"), "rate_limit_exceeded: Rate limit exceeded. Reset at"),
        (("models", "--key", "pml_test_wrong"), "invalid_api_key: "),
    ],
)
async def test_an_error_is_one_line_on_stderr_and_status_1(served, tmp_path, arguments, message):
    result = await run_command(served, tmp_path, *arguments)
    assert (result.status, result.out) == (1, "")
    assert result.error.startswith("pomelo: ")
    assert message in result.error
    assert result.error.count("\n") == 1


async def test_a_truncated_stream_prints_what_arrived_and_fails(served, tmp_path):
    result = await run_command(served, tmp_path, "run", "Hello [[cut]]", "--stream")
    assert result.status == 1
    assert result.out.strip()
    assert result.error.startswith("pomelo: provider_")


async def test_truncated_audio_leaves_no_file(served, tmp_path):
    result = await run_command(
        served, tmp_path, "run", "Hello [[cut]] there", "-m", "eleven-labs-tts", "--stream", "-o", "a.mp3"
    )
    assert result.status == 1
    assert list(tmp_path.iterdir()) == []


async def test_an_output_directory_is_refused_before_the_task_runs(served, tmp_path):
    (tmp_path / "there").mkdir()
    for out, message in (("there", "this is a directory"), ("none/a.png", "there is no directory none")):
        result = await run_command(
            served, tmp_path, "run", "[[error:rate_limit_exceeded]]", "-m", "flux-1-dev", "-o", out
        )
        assert (result.status, result.out) == (1, "")
        assert f"--out {out}: {message}" in result.error
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_file_that_can_not_be_renamed_leaves_no_partial_file_and_the_error_has_its_name(tmp_path):
    sink = _Sink(tmp_path / "a.txt")
    sink.write(b"x")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        sink.commit()
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "a.txt"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(OSError, match="too long") as caught:
        _Sink(tmp_path / ("n" * 254))
    assert caught.value.filename == str(tmp_path / ("n" * 254))


async def test_a_pipe_is_written_to_and_stays_a_pipe(served, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = asyncio.create_task(asyncio.to_thread((tmp_path / "pipe").read_bytes))
    result = await run_command(served, tmp_path, "run", "Hello", "-o", "pipe")
    assert result.status == 0
    assert b"Hello" in await reading
    assert (tmp_path / "pipe").is_fifo()


async def test_a_missing_server_and_a_missing_key_are_reported(served, tmp_path):
    no_server = await run_command(served, tmp_path, "run", "x", "--target", "127.0.0.1:1")
    assert "No server answers at 127.0.0.1:1" in no_server.error
    no_key = await run_command(served, tmp_path, "run", "x", POMELO_DATA=str(tmp_path / "none"))
    assert "POMELO_KEY" in no_key.error
    assert (no_server.status, no_key.status) == (1, 1)


async def test_a_key_of_the_environment_overrides_the_development_key(served, tmp_path):
    result = await run_command(served, tmp_path, "models", POMELO_KEY="pml_test_wrong")
    assert "invalid_api_key" in result.error
    good = await run_command(
        served, tmp_path, "models", POMELO_KEY=served.key, POMELO_DATA=str(tmp_path / "none")
    )
    assert good.status == 0


async def test_models_are_listed_with_their_prices(served, tmp_path):
    table = await run_command(served, tmp_path, "models")
    assert "gpt-4-turbo" in table.out
    assert "4/1M input tokens + 0.4/1M cached + 5/1M cache write + 20/1M output tokens" in table.out
    listed = json.loads((await run_command(served, tmp_path, "models", "--json")).out)
    assert len(listed) == 14
    assert {model["task_type"] for model in listed} == {
        "text",
        "image",
        "text-to-speech",
        "speech-to-speech",
        "speech-to-text",
    }
    assert all(model["prices"] and model["available"] for model in listed)


async def test_on_a_terminal_text_is_streamed_and_not_overwritten_by_progress(served, tmp_path):
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "pomelo.cli", "run", "Hello"),
        cwd=tmp_path,
        env=environment(tmp_path)
        | {"POMELO_DATA": str(served.data), "POMELO_GRPC": f"127.0.0.1:{served.grpc_port}"},
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
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux reports the end
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces).decode()


@pytest.mark.parametrize("option", ["--stream", "--no-stream"])
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
async def test_adjusted_fields_are_noted_on_stderr(served, tmp_path, model, field, note, option):
    result = await run_command(served, tmp_path, "run", "Hi", "-m", model, "-p", field, option)
    assert (result.status, result.error) == (0, note)
