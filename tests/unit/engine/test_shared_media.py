"""Media of tasks in a bucket: where they are when a result has been returned, and what reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec
from pomelo.testing import Answer as Words
from tests.s3_server import any_server
from tests.tasks import text_task
from tests.unit.engine.apps import STREAM, Answer, EngineApp, open_engine

KEY = {"idempotency-key": "k"}
IMAGE = {"model": "flux-1-pro", "prompt": "A kite", "width": 256, "height": 256}
SPEECH = {"model": "eleven-labs-tts", "text": "Good morning to you.", "voice": "adam"}


@pytest.fixture(scope="module", name="bucket")
def _bucket() -> Iterator[str]:
    server = any_server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        yield server.new_bucket()


@pytest.fixture(scope="module", name="opened_engine")
async def _opened_engine(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> AsyncIterator[EngineApp]:
    async with open_engine(tmp_path_factory.mktemp("shared"), media=bucket) as opened:
        yield opened


def files(bucket: str) -> dict[str, bytes]:
    """The files of the bucket, by folder and id."""
    store = S3Store.from_url(bucket)
    keys = [each["path"] for each in obstore.list(store).collect()]
    return {key: bytes(obstore.get(store, key).bytes()) for key in keys}


def result_of(answer: Answer, *, stream: bool) -> TaskResult:
    assert answer.code == "ok"
    result: TaskResult = answer.events[-1].completed if stream else answer.events[-1]
    return result


@STREAM
@pytest.mark.parametrize("task", [IMAGE, SPEECH], ids=["image", "speech"])
async def test_a_link_is_to_a_file_that_every_machine_reads(
    engine: EngineApp, bucket: str, task: dict[str, Any], stream: bool
) -> None:
    answer = await engine.ask(await engine.account(), {**task, "response_format": "url"}, stream=stream)
    result = result_of(answer, stream=stream)
    media = result.speech.media if result.HasField("speech") else result.image.images[0].media
    assert len(files(bucket)[f"hour/{media.id}"]) == media.size_bytes > 0
    assert engine.media() == []


@STREAM
@pytest.mark.parametrize("task", [IMAGE, SPEECH], ids=["image", "speech"])
async def test_a_stored_answer_is_repeated_from_the_bucket_and_kept_for_a_day(
    engine: EngineApp, bucket: str, task: dict[str, Any], stream: bool
) -> None:
    account = await engine.account()
    body = {**task, "response_format": "b64_json"}
    answers = [await engine.ask(account, body, stream=stream, headers=KEY) for _ in range(2)]
    for answer in answers:
        result = result_of(answer, stream=stream)
        assert not result.speech.HasField("media")
        assert not any(one.HasField("media") for one in result.image.images)
    first, again = (_bytes(answer) for answer in answers)
    assert first == again != b""
    assert [key for key, data in files(bucket).items() if data == first and key.startswith("day/")]
    assert engine.media() == []


def _bytes(answer: Answer) -> bytes:
    """The media of an answer: the chunks of a stream, or what is inline."""
    last = answer.events[-1]
    result = last if isinstance(last, TaskResult) else last.completed
    chunks = b"".join(event.audio_chunk.data for event in answer.events[1:-1])
    return chunks or result.speech.data or result.image.images[0].data


async def test_the_audio_of_a_task_is_read_from_the_bucket(engine: EngineApp) -> None:
    account, other = await engine.account(), await engine.account()
    media_id = await engine.upload(account, b"OggS" + b"audio" * 100, protocol="grpc")
    task = TaskSpec(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = media_id
    for _ in range(2):
        assert (await engine.ask(account, task, protocol="grpc")).code == "ok"
        assert engine.media() == []
    refusal = await engine.ask(other, task, protocol="grpc")
    assert (refusal.code, refusal.error and refusal.error.field) == ("invalid_parameter", "audio")


async def test_the_images_of_a_task_are_read_from_the_bucket(engine: EngineApp) -> None:
    account = await engine.account()
    png = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
    media_id = await engine.upload(account, png, "image/png", protocol="grpc")
    task = text_task("What is this?")
    task.text.messages[0].content.add().image.source.media_id = media_id
    for _ in range(2):
        engine.upstream.script(Words("A kite"))
        assert (await engine.ask(account, task, protocol="grpc")).code == "ok"
        assert engine.media() == []
