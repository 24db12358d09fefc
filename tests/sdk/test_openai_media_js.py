"""The JavaScript SDK of OpenAI makes images, speech and transcripts, in the sandbox and with played vendors."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.testing import Received, Reply, Transcript
from pomelo.testing.upstream import PROTOCOLS
from tests import node_client
from tests.app import RunningApp, app_fixture

FOLDER = Path(__file__).parent / "js"
SENTENCES = ["Good morning to you.", "How are you today?"]
TEXT = " ".join(SENTENCES)

app = app_fixture()


def answer(received: Received) -> Reply:
    """The vendors' usual replies, but a transcript of the text."""
    script = next(one for one in PROTOCOLS if one.serves(received)).default
    if received.path.endswith("/speech-to-text"):
        script = Transcript(TEXT)
    return script if isinstance(script, Reply) else script(received)


@pytest.mark.parametrize("mode", ["test", "live"])
async def test_the_javascript_sdk_makes_images_speech_and_transcripts(
    app: RunningApp, request: pytest.FixtureRequest, mode: str
) -> None:
    modules = node_client.install(Path(request.config.cache.mkdir("node")), FOLDER)
    account = await app.account()
    key = account.live if mode == "live" else account.test
    app.upstream.default = answer
    argument = {"url": app.urls["rest"], "key": key, "text": TEXT}
    found = await node_client.run(modules, str(FOLDER / "media.cjs"), argument)

    assert found["sameImage"]
    assert found["streamed"] == [["image_generation.completed", "png", "256x288"]]
    assert (found["audio"], found["wav"]) == ("ID3" if mode == "test" else "\xff\xfb\x90", "RIFF")
    transcripts = found["transcripts"]
    assert transcripts["json"]["text"] == transcripts["verbose_json"]["text"] == TEXT
    assert transcripts["text"] == TEXT + "\n"
    assert [each["text"] for each in transcripts["diarized_json"]["segments"]] == SENTENCES
    assert transcripts["srt"].startswith("1\n00:00:00,000 --> 00:00:0")
    assert transcripts["vtt"].startswith("WEBVTT\n\n00:00:00.000 --> 00:00:0")
    assert (found["words"], found["segments"]) == (TEXT, SENTENCES)
    assert found["events"] == [
        {"type": "transcript.text.delta", "delta": TEXT},
        {"type": "transcript.text.done", "text": TEXT},
    ]
    assert [(each["name"], each["code"], each["param"]) for each in found["failures"]] == [
        ("BadRequestError", "invalid_parameter", "size"),
        ("BadRequestError", "missing_parameter", "input"),
        ("BadRequestError", "invalid_parameter", "model"),
        ("AuthenticationError", "invalid_api_key", None),
        ("BadRequestError", "unsupported_model", "model"),
    ]
    assert all(each["hasId"] for each in found["failures"])
