"""The server without PyAV, which is not part of the default install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.speech_pb2 import TextToSpeechInput
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing import FaultUpstream
from tests.calls import bearer, failure
from tests.driver import STREAM
from tests.integration.commands import live_key, pomelo
from tests.serving import Served, serve
from tests.tasks import text_body, text_task
from tests.unit.media import corpus

COMMAND = "pip install 'pomelo-tasks[sandbox]'"
WAV = {"model": "eleven-labs-tts", "text": "Hello there.", "voice": "adam", "output_format": "wav_16000"}


@pytest.fixture(scope="module")
def without_av(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of a process in which `import av` fails."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "av.py").write_text("raise ModuleNotFoundError(\"No module named 'av'\", name='av')\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture(scope="module")
async def vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def variables(without_av: dict[str, str], vendor: FaultUpstream) -> dict[str, str]:
    """Environment variables of a server with live providers and without PyAV."""
    return without_av | {
        "OPENAI_API_KEY": "sk-x",
        "OPENAI_BASE_URL": vendor.openai_base_url,
        "ELEVENLABS_API_KEY": "x",
        "ELEVENLABS_BASE_URL": vendor.elevenlabs_base_url,
    }


@pytest.fixture(scope="module")
async def served(
    variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    async with serve(tmp_path_factory.mktemp("served"), **variables) as process:
        yield process


async def ask(served: Served, body: dict[str, Any], key: str = "") -> tuple[int, str]:
    """Runs a task; returns the status and the text of the answer."""
    headers = {"Authorization": f"Bearer {key or served.key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{served.url}/api/v1/task", json=body) as answer,
    ):
        return answer.status, await answer.text()


@STREAM
async def test_text_tasks_run_with_test_and_live_keys(
    served: Served, variables: dict[str, str], stream: bool
) -> None:
    for key in (served.key, await live_key(served.data.parent, **variables)):
        status, text = await ask(served, text_body(stream=stream), key)
        assert status == 200, text
        assert text.endswith("data: [DONE]\n\n") if stream else json.loads(text)["choices"]


async def test_text_tasks_run_over_grpc(served: Served) -> None:
    task = text_task()
    metadata = bearer(served.key)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        stub = TaskServiceStub(channel)
        answer = await stub.RunTask(RunTaskRequest(spec=task), metadata=metadata)
        stream = stub.StreamTask(StreamTaskRequest(spec=task), metadata=metadata)
        events = [event async for event in stream]
    assert "sandbox" in answer.result.text.message.content[0].text
    assert answer.result.text.message.content[0].text == "".join(
        response.event.text_delta.text for response in events
    )


async def test_formats_without_an_encoder_are_generated(served: Served) -> None:
    image = {"model": "flux-1-pro", "prompt": "A lake", "width": 64, "height": 64}
    status, text = await ask(served, {**image, "response_format": "b64_json"})
    assert status == 200, text
    assert b64decode(json.loads(text)["data"][0]["b64_json"]).startswith(b"\x89PNG")
    status, text = await ask(served, {**WAV, "response_format": "b64_json"})
    assert status == 200, text
    assert b64decode(json.loads(text)["audio"]["b64_json"]).startswith(b"RIFF")


@STREAM
@pytest.mark.parametrize(
    "body",
    [
        {"model": "flux-1-pro", "prompt": "A lake", "output_format": "jpeg"},
        {"model": "flux-1-pro", "prompt": "A lake", "output_format": "webp"},
        {"model": "eleven-labs-tts", "text": "Hello", "voice": "adam"},
        {**WAV, "output_format": "opus_48000_64"},
    ],
    ids=["jpeg", "webp", "mp3", "opus"],
)
async def test_formats_with_an_encoder_are_refused_with_the_install_command(
    served: Served, body: dict[str, Any], stream: bool
) -> None:
    status, text = await ask(served, {**body, "stream": stream})
    assert status == 503
    error = json.loads(text)["error"]
    assert error["code"] == "provider_not_configured"
    assert COMMAND in error["message"]


async def test_formats_with_an_encoder_are_refused_over_grpc(served: Served) -> None:
    task = TaskSpec(model="eleven-labs-tts", text_to_speech=TextToSpeechInput(text="Hello", voice="adam"))
    metadata = bearer(served.key)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        error = await failure(TaskServiceStub(channel).RunTask(RunTaskRequest(spec=task), metadata=metadata))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert COMMAND in str(error.details())


async def test_live_audio_that_cannot_be_measured_reserves_its_maximum_cost(
    served: Served, variables: dict[str, str]
) -> None:
    # One second of WAV has 32 KB: at 125 bytes a second, that is 256 s, or about $0.016. Measured, it costs $0.0001.
    folder = served.data.parent
    created = await pomelo(folder, "accounts", "create", "poor", "--credits", "0.005", **variables)
    assert created.status == 0, created.error
    poor = (await pomelo(folder, "keys", "create", "poor", "--live", **variables)).out.split()[-1]
    rich = await live_key(folder, **variables)
    answers = []
    for key in (poor, rich):
        form = aiohttp.FormData({"model": "eleven-labs-stt"})
        form.add_field("audio", corpus.make("wav", 1), filename="audio.wav")
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
            session.post(f"{served.url}/api/v1/task", data=form) as answer,
        ):
            answers.append((answer.status, await answer.text()))
    assert [status for status, _ in answers] == [402, 200], answers
    assert f"Run: {COMMAND}" in served.log()


def test_a_label_of_raw_samples_does_not_replace_a_measurement(without_av: dict[str, str]) -> None:
    code = (
        "import asyncio\n"
        "from pomelo.media.duration import Measurer\n"
        "from pomelo.media.audio import AudioSource\n"
        "async def main():\n"
        "    measurer = Measurer()\n"
        "    for label in ('', 'audio/pcm;rate=48000'):\n"
        "        print((await measurer.measure(AudioSource(label, 96_000, data=bytes(96_000)))).ms)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **without_av},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == ["0", "0"]


async def test_doctor_reports_what_to_install(without_av: dict[str, str], tmp_path: Path) -> None:
    ended = await pomelo(tmp_path, "doctor", "--json", **without_av)
    (finding,) = [row for row in json.loads(ended.out) if row["name"] == "PyAV"]
    assert finding["state"] == "off"
    assert COMMAND in finding["detail"]
    with_av = await pomelo(tmp_path, "doctor", "--json")
    assert "PyAV" not in {row["name"] for row in json.loads(with_av.out)}
