"""Runs every runnable block of docs/rest-api.md, with only the host and the key replaced."""

from __future__ import annotations

import json
import re
import shutil
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import av
import pytest

from tests.integration.commands import output_of
from tests.serving import Served

PAGE = Path(__file__).parents[2] / "docs" / "rest-api.md"
BLOCKS = re.findall(r"```(bash|python|javascript)\n(.*?)```", PAGE.read_text(), re.DOTALL)
SHOW = {
    "python": "\nprint(response.text)\n",
    "javascript": "\nconsole.log(JSON.stringify(data));\n",
    "bash": "",
}
COMMANDS = {
    "python": (sys.executable, "-c"),
    "javascript": ("node", "--input-type=module", "-e"),
    "bash": ("bash", "-c"),
}
SHAPES = {
    "task.completion": ({"id", "object", "created", "model", "choices", "usage"}, "task_"),
    "image.generation": ({"id", "object", "created", "model", "data"}, "img_"),
    "speech.generation": ({"id", "object", "created", "model", "audio"}, "speech_"),
    "speech.transcription": ({"id", "object", "created", "model", "text", "language", "words"}, "speech_"),
}
RESOURCES = {
    "account": {"id", "object", "mode", "plan", "limits", "credits"},
    "list": {"object", "data", "next_page_token"},
}


@pytest.fixture(scope="module")
async def folder(
    served: Served, http: aiohttp.ClientSession, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with an input.mp3, which the server generated."""
    folder = tmp_path_factory.mktemp("examples")
    body = {"model": "eleven-labs-tts", "text": "This is the input.", "voice": "adam"}
    headers = served.headers | {"Accept": "audio/*"}
    async with http.post(f"{served.url}/api/v1/task", json=body, headers=headers) as answer:
        assert answer.content_type == "audio/mpeg"
        (folder / "input.mp3").write_bytes(await answer.read())
    return folder


async def run(language: str, code: str, folder: Path) -> str:
    """Returns the output of a block."""
    command = (*COMMANDS[language], code)
    if shutil.which(command[0]) is None or (language == "bash" and shutil.which("curl") is None):
        pytest.skip(f"{command[0]} or curl is not on this machine")
    return await output_of(*command, cwd=folder)


def test_the_page_has_examples() -> None:
    assert [language for language, _ in BLOCKS].count("bash") >= 6
    assert {"python", "javascript"} <= {language for language, _ in BLOCKS}


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[f"{i} {b[0]}" for i, b in enumerate(BLOCKS)])
async def test_an_example_runs_unchanged(language: str, code: str, served: Served, folder: Path) -> None:
    code = code.replace("https://your-domain.com", served.url).replace("YOUR_API_KEY", served.key)
    printed = await run(language, code + SHOW[language], folder)
    if "-o speech.mp3" in code:
        with av.open(str(folder / "speech.mp3"), "r") as audio:
            assert sum(frame.samples for frame in audio.decode(audio=0)) > 10_000
    elif '"stream": true' in code:
        assert printed.rstrip().endswith("data: [DONE]")
        assert printed.count("task.completion.chunk") > 5
    else:
        await check(json.loads(printed.strip().splitlines()[-1]), code, served)


async def check(found: dict[str, Any], code: str, served: Served) -> None:
    """Checks the documented shape of a response, and that media decode and equal the file behind their link."""
    if found["object"] in RESOURCES:
        assert set(found) == RESOURCES[found["object"]]
        return
    fields, prefix = SHAPES[found["object"]]
    assert set(found) == fields
    assert found["id"].startswith(prefix)
    assert isinstance(found["created"], int)
    assert found["model"] in code
    if media := found.get("audio") or found.get("data", [None])[0]:
        data = b64decode(media["b64_json"])
        async with aiohttp.ClientSession() as session, session.get(media["url"]) as answer:
            assert await answer.read() == data
        with av.open(BytesIO(data), "r") as file:
            frames = list(file.decode(file.streams[0]))
        assert frames
        if "1024" in code:
            image = frames[0]
            assert isinstance(image, av.VideoFrame)
            assert (image.width, image.height) == (1024, 1024)
    elif found["object"] == "speech.transcription":
        assert found["text"] == "This is the input."
    else:
        (choice,) = found["choices"]
        assert choice["message"]["role"] == "assistant"
        calls_tools = '"tools"' in code and '"tool"' not in code
        assert (choice["finish_reason"] == "tool_calls") == calls_tools
        assert choice["message"]["tool_calls" if calls_tools else "content"]
        assert all(isinstance(found["usage"][f"{n}_tokens"], int) for n in ("prompt", "completion", "total"))
