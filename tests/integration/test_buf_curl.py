"""`buf curl` runs every task type by server reflection alone, without generated stubs."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.commands import output_of
from tests.serving import Served

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
AUDIO = base64.b64encode(b"some audio " * 200).decode()
TASKS: dict[str, dict[str, Any]] = {
    "text": {"model": "gpt-4", "text": {"messages": [{"role": "ROLE_USER", "content": [{"text": "Hi"}]}]}},
    "image": {"model": "flux-1-pro", "image": {"prompt": "A kite", "width": 64, "height": 64}},
    "speech": {"model": "eleven-labs-tts", "textToSpeech": {"text": "Hi", "voice": "adam"}},
    "voice": {"model": "eleven-labs-sts", "speechToSpeech": {"audio": {"data": AUDIO}, "voice": "adam"}},
    "transcription": {"model": "eleven-labs-stt", "speechToText": {"audio": {"data": AUDIO}}},
}


async def curl(served: Served, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls a method; returns the messages of its response."""
    assert BUF is not None, "buf is among the development dependencies"
    out = await output_of(
        *(BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect"),
        *("-H", f"authorization: Bearer {served.key}", "-d", json.dumps(request)),
        f"http://127.0.0.1:{served.grpc_port}/pomelo.v1.{method}",
    )
    decoder = json.JSONDecoder()
    text, messages = out.strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        messages.append(message)
        text = text[end:].lstrip()
    return messages


@pytest.mark.parametrize("task_type", TASKS)
async def test_run_task_runs_every_task_type(task_type: str, served: Served) -> None:
    (answer,) = await curl(served, "TaskService/RunTask", {"spec": TASKS[task_type]})
    result = answer["result"]
    assert result["model"] == TASKS[task_type]["model"]
    assert result[{"voice": "speech"}.get(task_type, task_type)]


@pytest.mark.parametrize(("task_type", "event"), [("text", "textDelta"), ("speech", "audioChunk")])
async def test_stream_task_sends_several_events(task_type: str, event: str, served: Served) -> None:
    responses = await curl(served, "TaskService/StreamTask", {"spec": TASKS[task_type]})
    events = [response["event"] for response in responses]
    assert "started" in events[0]
    assert event in events[1]
    assert len(events) > 2
    if task_type == "text":
        assert events[-1]["completed"]["text"]["finishReason"] == "FINISH_REASON_STOP"
    else:
        assert events[-1]["completed"]["speech"]


async def test_list_models_returns_all_fourteen_models(served: Served) -> None:
    (answer,) = await curl(served, "ModelService/ListModels", {})
    assert len(answer["models"]) == 14
    assert all(model["prices"] and model["available"] for model in answer["models"])
