"""Long transcripts are completed and rendered in threads, so that other callers don't wait for them."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from pomelo.testing import Transcript
from tests.app import RunningApp, app_fixture
from tests.driver import PROTOCOL_AND_STREAM
from tests.wav import PCM, wav_file

app = app_fixture()

AUDIO = base64.b64encode(wav_file(PCM, 8_000, 2, bytes(1_000_000))).decode()
STT = {"model": "eleven-labs-stt", "audio": AUDIO}


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("count", [5_000, 5_001])
async def test_only_a_long_transcript_is_processed_in_threads(
    app: RunningApp, protocol: str, stream: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: list[str] = []
    to_thread = asyncio.to_thread

    def record(function: Any, *arguments: Any) -> Any:
        functions.append(getattr(function, "__name__", ""))
        return to_thread(function, *arguments)

    caller = await app.account("wide")
    app.upstream.script(Transcript(("word " * count).strip()))
    monkeypatch.setattr(asyncio, "to_thread", record)
    answer = await app.ask(protocol, caller.live, STT, stream=stream)
    assert (answer.code, len(answer.content.split())) == ("ok", count)
    is_long = count > 5_000
    assert functions.count("count") == is_long
    rendered = [name for name in functions if name in ("render_result", "<lambda>")]
    assert len(rendered) == (is_long and protocol != "grpc")
