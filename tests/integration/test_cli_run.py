"""`pomelo run` and `pomelo models` against a server: what is asked, printed, and written."""

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
from tests.integration.commands import Ended, environment, pomelo
from tests.serving import Served, serve


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """`pomelo serve`, whose data folder the commands share."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        yield process


async def ask(served: Served, folder: Path, *arguments: str, stdin: bytes = b"", **variables: str) -> Ended:
    """Runs a command as the operator of the server would."""
    variables = {"POMELO_DATA": str(served.data), "POMELO_GRPC": f"127.0.0.1:{served.grpc_port}"} | variables
    return await pomelo(folder, *arguments, stdin=stdin, **variables)


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
async def test_a_text_is_printed_with_an_end_of_line_and_nothing_else(served, tmp_path, how):
    ended = await ask(served, tmp_path, "run", "Hello", "--model", "gpt-4", how)
    assert (ended.status, ended.error) == (0, "")
    assert '"Hello"' in ended.out
    assert ended.out.endswith("\n")
    assert not ended.out.endswith("\n\n")


async def test_a_text_comes_from_a_file_or_from_stdin_and_goes_to_a_file(served, tmp_path):
    (tmp_path / "question.txt").write_text("From a file")
    ended = await ask(served, tmp_path, "run", "-m", "gpt-4", "-f", "question.txt", "-o", "answer.txt")
    assert (ended.status, ended.out) == (0, "answer.txt\n")
    assert "From a file" in (tmp_path / "answer.txt").read_text()
    assert "From stdin" in (await ask(served, tmp_path, "run", "-", stdin=b"From stdin")).out


async def test_a_text_that_was_cut_is_noted_beside_it(served, tmp_path):
    ended = await ask(served, tmp_path, "run", "Hello", "-p", "max_tokens=2", "--stream")
    assert "max_tokens" in ended.error
    assert len(ended.out.split()) <= 2


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
async def test_a_picture_is_written_under_its_id_with_the_fields_that_were_given(served, tmp_path, how):
    fields = [f"-p{field}" for field in ("width=128", "height=64", "output_format=webp")]
    ended = await ask(served, tmp_path, "run", "a tree", "-m", "flux-1-schnell", how, *fields)
    assert ended.status == 0
    path = tmp_path / ended.out.strip()
    assert path.name.startswith("img_")
    assert path.suffix == ".webp"
    with av.open(BytesIO(path.read_bytes())) as picture:
        frame = next(picture.decode(video=0))
        assert (frame.width, frame.height) == (128, 64)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


async def test_sound_is_spoken_changed_and_written_down(served, tmp_path):
    made = await ask(
        served, tmp_path, "run", "Good morning", "-m", "eleven-labs-tts", "-o", "a.mp3", "--stream"
    )
    assert (made.status, made.out) == (0, "a.mp3\n")
    whole = await ask(
        served, tmp_path, "run", "Good morning", "-m", "eleven-labs-tts", "-o", "-", "--no-stream"
    )
    assert whole.raw == (tmp_path / "a.mp3").read_bytes()
    changed = await ask(served, tmp_path, "run", "-m", "eleven-labs-sts", "-f", "a.mp3", "--voice", "bella")
    assert changed.status == 0
    assert (tmp_path / changed.out.strip()).suffix == ".mp3"
    heard = await ask(served, tmp_path, "run", "-m", "eleven-labs-stt", "-f", "a.mp3")
    assert heard.out.lower().startswith("good morning")


async def test_a_sound_that_is_too_large_for_a_message_is_uploaded_first(served, tmp_path):
    fields = ["-p", "output_format=wav_44100"]
    made = await ask(
        served, tmp_path, "run", "A long story. " * 80, "-m", "eleven-labs-tts", "-o", "a.wav", *fields
    )
    assert made.status == 0
    assert (tmp_path / "a.wav").stat().st_size > 4 * 1024 * 1024
    heard = await ask(served, tmp_path, "run", "-m", "eleven-labs-stt", "-f", "a.wav")
    assert (heard.status, heard.error) == (0, "")


async def test_a_link_is_printed_when_one_is_asked_for(served, tmp_path):
    ended = await ask(served, tmp_path, "run", "a tree", "-m", "flux-1-dev", "-p", "response_format=url")
    assert ended.out.startswith(f"{served.url}/")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
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
async def test_an_error_is_one_line_on_stderr_and_status_1(served, tmp_path, arguments, says):
    ended = await ask(served, tmp_path, *arguments)
    assert (ended.status, ended.out) == (1, "")
    assert ended.error.startswith("pomelo: ")
    assert says in ended.error
    assert ended.error.count("\n") == 1


async def test_a_stream_that_is_cut_prints_what_came_and_fails(served, tmp_path):
    ended = await ask(served, tmp_path, "run", "Hello [[cut]]", "--stream")
    assert ended.status == 1
    assert ended.out.strip()
    assert ended.error.startswith("pomelo: provider_")


async def test_a_sound_that_is_cut_leaves_no_file(served, tmp_path):
    ended = await ask(
        served, tmp_path, "run", "Hello [[cut]] there", "-m", "eleven-labs-tts", "--stream", "-o", "a.mp3"
    )
    assert ended.status == 1
    assert list(tmp_path.iterdir()) == []


async def test_a_directory_is_refused_before_anything_is_asked(served, tmp_path):
    (tmp_path / "there").mkdir()
    for out, says in (("there", "this is a directory"), ("none/a.png", "there is no directory none")):
        ended = await ask(
            served, tmp_path, "run", "[[error:rate_limit_exceeded]]", "-m", "flux-1-dev", "-o", out
        )
        assert (ended.status, ended.out) == (1, "")
        assert f"--out {out}: {says}" in ended.error
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_file_that_can_not_be_kept_leaves_no_part_and_is_named_as_it_was_given(tmp_path):
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


async def test_a_pipe_is_written_to_and_stays_one(served, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = asyncio.create_task(asyncio.to_thread((tmp_path / "pipe").read_bytes))
    ended = await ask(served, tmp_path, "run", "Hello", "-o", "pipe")
    assert ended.status == 0
    assert b"Hello" in await reading
    assert (tmp_path / "pipe").is_fifo()


async def test_no_server_and_no_key_are_said_so(served, tmp_path):
    nobody = await ask(served, tmp_path, "run", "x", "--target", "127.0.0.1:1")
    assert "No server answers at 127.0.0.1:1" in nobody.error
    keyless = await ask(served, tmp_path, "run", "x", POMELO_DATA=str(tmp_path / "none"))
    assert "POMELO_KEY" in keyless.error
    assert (nobody.status, keyless.status) == (1, 1)


async def test_a_key_of_the_environment_goes_before_the_development_key(served, tmp_path):
    ended = await ask(served, tmp_path, "models", POMELO_KEY="pml_test_wrong")
    assert "invalid_api_key" in ended.error
    good = await ask(served, tmp_path, "models", POMELO_KEY=served.key, POMELO_DATA=str(tmp_path / "none"))
    assert good.status == 0


async def test_models_are_listed_with_their_prices(served, tmp_path):
    table = await ask(served, tmp_path, "models")
    assert "gpt-4-turbo" in table.out
    assert "4/1M input tokens + 0.4/1M cached + 5/1M cache write + 20/1M output tokens" in table.out
    listed = json.loads((await ask(served, tmp_path, "models", "--json")).out)
    assert len(listed) == 14
    assert {model["task_type"] for model in listed} == {
        "text",
        "image",
        "text-to-speech",
        "speech-to-speech",
        "speech-to-text",
    }
    assert all(model["prices"] and model["available"] for model in listed)


async def test_on_a_terminal_text_streams_and_progress_takes_nothing_of_it_away(served, tmp_path):
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
    """What is written to a terminal until its last writer has left."""
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux's way of telling the end
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces).decode()


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
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
async def test_adjusted_fields_are_noted_on_stderr(served, tmp_path, model, field, note, how):
    ended = await ask(served, tmp_path, "run", "Hi", "-m", model, "-p", field, how)
    assert (ended.status, ended.error) == (0, note)
