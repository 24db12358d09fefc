"""`buf curl` reaches every kind of task by reflection alone, as an engineer without stubs would."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Served, serve

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
SOUND = base64.b64encode(b"some sound " * 200).decode()
TASKS: dict[str, dict[str, Any]] = {
    "text": {"model": "gpt-4", "text": {"messages": [{"role": "ROLE_USER", "content": "Hi"}]}},
    "image": {"model": "flux-1-pro", "image": {"prompt": "A kite", "width": 64, "height": 64}},
    "speech": {"model": "eleven-labs-tts", "textToSpeech": {"text": "Hi", "voice": "adam"}},
    "voice": {"model": "eleven-labs-sts", "speechToSpeech": {"audio": {"data": SOUND}, "voice": "adam"}},
    "transcription": {"model": "eleven-labs-stt", "speechToText": {"audio": {"data": SOUND}}},
}


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """`pomelo serve`, as a process of its own."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        yield process


async def curl(served: Served, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages that come back."""
    assert BUF is not None, "buf is among the development dependencies"
    process = await asyncio.create_subprocess_exec(
        *(BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect"),
        *("-H", f"authorization: Bearer {served.key}", "-d", json.dumps(request)),
        f"http://127.0.0.1:{served.grpc_port}/pomelo.v1.{method}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    decoder = json.JSONDecoder()
    text, found = out.decode().strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        found.append(message)
        text = text[end:].lstrip()
    return found


@pytest.mark.parametrize("kind", TASKS)
async def test_run_task_answers_every_kind(kind: str, served: Served) -> None:
    (answer,) = await curl(served, "TaskService/RunTask", {"task": TASKS[kind]})
    result = answer["result"]
    assert result["model"] == TASKS[kind]["model"]
    assert result[{"voice": "speech"}.get(kind, kind)]


@pytest.mark.parametrize("kind", ["text", "speech"])
async def test_stream_task_answers_piece_by_piece(kind: str, served: Served) -> None:
    events = await curl(served, "TaskService/StreamTask", {"task": TASKS[kind]})
    assert "started" in events[0]
    assert len(events) > 2
    last = events[-1]
    assert (
        last["textDelta"]["finishReason"] == "FINISH_REASON_STOP"
        if kind == "text"
        else last["result"]["speech"]
    )


async def test_list_models_has_all_fourteen(served: Served) -> None:
    (answer,) = await curl(served, "ModelService/ListModels", {})
    assert len(answer["models"]) == 14
    assert all(model["prices"] and model["available"] for model in answer["models"])
