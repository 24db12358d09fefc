"""Every method of both clients returns what the server has."""

from __future__ import annotations

import asyncio
import io
import time
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pomelo.app import App
from pomelo.client import InvalidParameter, TextResult, assistant, system, to_credits, user
from pomelo.client.files import MAX_INLINE_BYTES
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import TextOutput
from pomelo.stores.accounts import Grant, Wallet
from tests.client.clients import Pipe, read
from tests.client.conftest import ClientFactory
from tests.conftest import Keys
from tests.wav import PCM, wav_file

PNG = b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


async def test_a_text_has_its_usage_cost_and_limits(client: Any) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    result = await client.text("gpt-4", "[[words:7]] Hello", request_id="req-of-mine")
    assert len(result.text.split()) == 7
    assert result.finish_reason == "stop"
    assert (result.usage.input_tokens, result.usage.output_tokens) == (2, 7)
    assert result.cost == to_credits(result.raw.cost_micros) > 0
    assert result.model == "gpt-4"
    assert result.id.startswith("task_")
    assert before < result.created <= datetime.now(UTC)
    assert result.request_id == "req-of-mine"
    assert result.limits.credits is not None
    assert result.tool_calls == []
    assert not result.replayed


def test_a_finish_reason_that_only_a_newer_server_knows_is_empty() -> None:
    newer: Any = 99
    assert TextResult(TaskResult(text=TextOutput(finish_reason=newer)), {}).finish_reason == ""


@pytest.mark.parametrize(("raw", "cost"), [(TaskResult(cost_micros=0), Decimal(0)), (TaskResult(), None)])
def test_a_cost_of_nothing_differs_from_one_that_is_not_known(raw: TaskResult, cost: Decimal | None) -> None:
    assert TextResult(raw, {}).cost == cost


async def test_messages_can_be_dicts_or_made_by_functions(client: Any) -> None:
    first = await client.text("gpt-4", "[[words:5]] One two")
    messages = [
        system("Be brief"),
        user("[[words:5]] One two"),
        first.message,
        {"role": "user", "content": "Three"},
    ]
    result = await client.text("gpt-4", messages, max_tokens=3)
    assert result.usage.input_tokens == 2 + 3 + 5 + 1
    assert result.finish_reason == "length"
    assert (
        await client.text("gpt-4", [user("a"), assistant("b"), user("c")], system="d e")
    ).usage.input_tokens == 5


async def test_images_go_into_a_message_as_bytes_a_path_or_an_upload(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "dot.png"
    path.write_bytes(PNG)
    media = await client.upload(path)
    assert media.content_type == "image/png"
    result = await client.text(
        "gpt-4", [user("What is it?", images=[PNG, path, str(path), media], detail="low")]
    )
    assert result.usage.input_tokens == 3 + 4 * 85


async def test_a_result_is_shown_by_its_id_and_model_without_its_content(client: Any) -> None:
    result = await client.text("gpt-4", "Say something")
    assert repr(result) == f"TextResult(id='{result.id}', model='gpt-4')"


async def test_a_stream_yields_text_and_then_has_the_same_result(client: Any) -> None:
    whole = await client.text("gpt-4", "Say something", seed=3)
    async with client.stream("gpt-4", "Say something", seed=3) as stream:
        pieces = [piece async for piece in stream]
        assert [piece async for piece in stream] == []
    assert len(pieces) > 10
    assert "".join(pieces) == whole.text == stream.result.text
    assert stream.result.message == whole.message
    assert stream.result.usage == whole.usage
    assert stream.result.cost == whole.cost
    assert stream.result.limits.credits is not None


async def test_an_answer_without_text_can_be_continued(client: Any) -> None:
    whole = await client.text("gpt-4", "Hello", stop="This")  # with which the sandbox begins
    streamed = await read(client.stream("gpt-4", "Hello", stop="This"), [])
    assert whole.text == ""
    assert streamed.message == whole.message
    assert (await client.text("gpt-4", [user("Hello"), streamed.message, user("Go on")])).text


async def test_an_empty_text_is_sent(client: Any) -> None:
    assert (await client.text("gpt-4", "")).text == (await client.text("gpt-4", [user("")])).text


async def test_a_stream_yields_the_events_of_the_contract_on_request(client: Any) -> None:
    async with client.stream("gpt-4", "[[words:3]] Hi") as stream:
        events = [event.WhichOneof("event") async for event in stream.events()]
    assert events == ["started", "text_delta", "text_delta", "text_delta", "completed"]
    assert len(stream.result.text.split()) == 3


async def test_an_image_comes_whole_as_a_link_or_with_its_progress(client: Any, tmp_path: Path) -> None:
    image = await client.image("flux-1-pro", "A kite", width=64, height=64, seed=1)
    assert image.data.startswith(b"\x89PNG")
    assert image.content_type == "image/png"
    assert image.media is None
    linked = await client.image("flux-1-pro", "A kite", width=64, height=64, seed=1, delivery="link")
    assert linked.data == b""
    assert linked.media.url.startswith("http")
    stored = await client.download(linked.media, tmp_path / "kite.png")
    assert (tmp_path / "kite.png").read_bytes() == image.data
    assert stored.content_type == "image/png"
    async with client.stream_image("flux-1-pro", "A kite", width=64, height=64, seed=1) as stream:
        progress = [piece async for piece in stream]
    assert progress == sorted(progress)
    assert progress[-1] == 1
    assert stream.result.data == image.data


async def test_speech_comes_whole_or_in_pieces(client: Any) -> None:
    task: dict[str, Any] = {"voice": "adam", "voice_settings": {"speed": 2}, "output_format": "wav_8000"}
    speech = await client.speech("eleven-labs-tts", "Good morning to you all.", **task)
    assert speech.data.startswith(b"RIFF")
    assert speech.content_type == "audio/wav"
    async with client.stream_speech("eleven-labs-tts", "Good morning to you all.", **task) as stream:
        data = b"".join([piece async for piece in stream])
    assert data == speech.data
    assert stream.result.data == b""
    assert stream.result.usage.characters == 24
    other: dict[str, Any] = {"voice": "bella", "output_format": "pcm_8000"}
    converted = await client.convert_speech("eleven-labs-sts", speech.data, **other)
    async with client.stream_converted_speech("eleven-labs-sts", speech.data, **other) as stream:
        assert b"".join([piece async for piece in stream]) == converted.data != b""


async def test_small_audio_is_sent_in_the_task(client: Any, app: App, tmp_path: Path) -> None:
    speech = await client.speech("eleven-labs-tts", "Hear this.", voice="adam", output_format="wav_8000")
    path = tmp_path / "speech.wav"
    path.write_bytes(speech.data)
    stored = set((app.settings.data / "media").iterdir())
    for audio in (speech.data, path, str(path), io.BytesIO(speech.data)):
        transcript = await client.transcribe("eleven-labs-stt", audio, timestamps="word", idempotency_key="")
        assert transcript.text == "Hear this."
        assert [word.text for word in transcript.words] == ["Hear", "this."]
        assert transcript.language == "en"
    assert set((app.settings.data / "media").iterdir()) == stored


async def test_concurrent_calls_share_a_client(client: Any) -> None:
    results = await asyncio.gather(*[client.text("gpt-4", f"[[words:{n}]] Hi") for n in range(1, 21)])
    assert [len(result.text.split()) for result in results] == list(range(1, 21))


async def test_large_audio_is_uploaded_first(client: Any, app: App, tmp_path: Path) -> None:
    audio = wav_file(PCM, 16_000, 2, bytes(120 * 32_000))
    assert len(audio) > MAX_INLINE_BYTES
    path = tmp_path / "long.wav"
    path.write_bytes(audio)
    texts = set()
    for source in (path, audio, io.BufferedReader(Pipe(audio))):
        transcript = await client.transcribe("eleven-labs-stt", source)
        assert transcript.usage.audio_seconds == pytest.approx(120, abs=0.01)
        texts.add(transcript.text)
    assert len(texts) == 1, "the same bytes"


async def test_a_file_is_uploaded_from_its_position_and_downloaded_into_an_open_file(client: Any) -> None:
    speech = await client.speech("eleven-labs-tts", "Up and down.", voice="adam", output_format="wav_8000")
    file = io.BytesIO(b"skipped" + speech.data)
    file.seek(7)
    media = await client.upload(file)
    assert media.content_type == "audio/wav"
    assert media.size_bytes == len(speech.data)
    target = io.BytesIO()
    await client.download(media.id, target)
    assert target.getvalue() == speech.data
    assert (await client.transcribe("eleven-labs-stt", media)).text == "Up and down."


async def test_raw_samples_have_a_content_type(client: Any) -> None:
    samples = bytes(16_000)
    transcript = await client.transcribe("eleven-labs-stt", samples, content_type="audio/pcm;rate=8000")
    assert transcript.usage.audio_seconds == pytest.approx(1)


async def test_the_account_its_models_and_its_usage(connect: ClientFactory, app: App) -> None:
    name = f"client-{time.time_ns()}"
    await app.store.add_account(name, "pro", time.time())
    await app.store.grant(Grant(name, Wallet(name, False), 5_000_000, time.time()))
    client = connect((await app.keyring.create(name, name="k"))[1])
    account = await client.account()
    assert (account.id, account.plan) == (name, "pro")
    assert to_credits(account.balance.available_micros) == Decimal(5)
    models = {model.id: model async for model in client.models()}
    assert {"gpt-4", "flux-1-pro"} <= set(models)
    results = [
        await client.text("gpt-4", f"Count {number}", user="ann", metadata={"team": "red"})
        for number in range(3)
    ]
    await client.image("flux-1-pro", "A kite", width=64, height=64)
    records = [record async for record in client.usage(model="gpt-4")]
    assert [record.id for record in records] == [result.id for result in reversed(results)]
    assert {(record.user, record.metadata["team"]) for record in records} == {("ann", "red")}
    assert len([record async for record in client.usage()]) == 4
    sums = [each async for each in client.usage_sums("user", "metadata.team", "task_type")]
    assert [(list(each.groups), each.tasks) for each in sums] == [
        (["", "", "image"], 1),
        (["ann", "red", "text"], 3),
    ]
    assert to_credits(sums[1].cost_micros) == sum(result.cost for result in results)
    assert [each.tasks async for each in client.usage_sums(model="gpt-4")] == [3]
    assert (await client.model("gpt-4")).id == "gpt-4"
    hour = timedelta(hours=1)
    now = datetime.now(UTC)
    assert [record async for record in client.usage(start=now + hour)] == []
    assert len([record async for record in client.usage(start=now - hour, end=now + hour)]) == 4
    limits = results[-1].limits
    assert (limits.requests.limit, limits.requests.remaining) == (300, 297)
    assert now < limits.requests.reset <= now + timedelta(seconds=61)
    assert limits.tokens.limit == 400_000
    assert (limits.concurrent.limit, limits.concurrent.reset) == (20, None)
    assert limits.credits == Decimal(5) - sum(result.cost for result in results)


async def test_a_field_that_the_model_does_not_support_is_reported_or_refused(
    connect: ClientFactory, keys: Keys
) -> None:
    client = connect(keys.test)
    result = await client.text("claude-3-opus", "Hi", seed=1)
    assert [adjustment.field for adjustment in result.adjustments] == ["seed"]
    with pytest.raises(InvalidParameter) as caught:
        await client.text("claude-3-opus", "Hi", seed=1, strict=True)
    assert caught.value.field == "seed"
    strict = connect(keys.test, strict=True)
    with pytest.raises(InvalidParameter):
        await strict.text("claude-3-opus", "Hi", seed=1)
    assert (await strict.text("claude-3-opus", "Hi", seed=1, strict=False)).text
