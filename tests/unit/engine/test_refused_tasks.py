"""Tasks that are refused before a provider is called leave no reservation, record or false header."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.engine.ledger import Ledger
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.tasks.base import LARGE
from tests.tasks import TASK_TYPES, small_task, text_task, to_task
from tests.unit.engine.apps import CREDITS, PROTOCOL, STREAM, Account, EngineApp, open_engine

IMAGE = {"model": "flux-1-pro", "prompt": "A kite"}
TEXT = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9}
AUDIO = b"OggS" + b"some audio" * 100


@pytest.fixture(scope="module", name="opened_engine")
async def _opened_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineApp]:
    """An app whose only configured provider is OpenAI."""
    folder = tmp_path_factory.mktemp("refused")
    async with open_engine(folder, bfl_api_key=None, elevenlabs_api_key=None) as opened:
        yield opened


@STREAM
@pytest.mark.parametrize("fails", [True, False], ids=["fails", "hangs"])
async def test_a_deadline_that_passes_before_a_task_is_reserved_is_reported_whatever_the_store_does(
    engine: EngineApp, monkeypatch: pytest.MonkeyPatch, fails: bool, stream: bool
) -> None:
    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    async def fail(*_: Any) -> None:
        raise PomeloError("store_unavailable")

    account = await engine.account("limited")
    monkeypatch.setattr(Ledger, "reserve", hang)
    monkeypatch.setattr(Ledger, "limit_status", fail if fails else hang)
    async with asyncio.timeout(20):
        answer = await engine.ask(account, TEXT, stream=stream, within=0.5)
    assert answer.code == "deadline_exceeded"


@STREAM
async def test_a_task_without_a_provider_takes_nothing_and_reports_no_charge(
    engine: EngineApp, stream: bool
) -> None:
    account = await engine.account("limited")
    answer = await engine.ask(account, IMAGE, stream=stream)
    assert answer.code == "provider_not_configured"
    reply = answer.call.response_headers
    assert "X-Credits-Charged" not in reply
    assert "X-Credits-Charged" not in answer.call.response_trailers
    assert reply["X-Credits-Remaining"] == "1000"
    assert reply["X-RateLimit-Remaining"] == "5"
    assert reply["X-RateLimit-Remaining-Concurrent"] == "2"
    used = await engine.used(account)
    assert (used.requests, used.concurrency, used.available) == (0, 0, 10**9)
    assert not await engine.records(account)


async def test_a_refused_task_reports_the_limits_of_its_model(engine: EngineApp) -> None:
    account = await engine.account("limited")
    answer = await engine.ask(account, {**TEXT, "max_tokens": 0})
    assert answer.code == "invalid_parameter"
    assert answer.call.response_headers["X-RateLimit-Remaining-Tokens"] == "100000"
    answer = await engine.ask(account, {**IMAGE, "width": 5})
    assert answer.code == "invalid_parameter"
    assert "X-RateLimit-Remaining-Tokens" not in answer.call.response_headers


@STREAM
@PROTOCOL
@pytest.mark.parametrize("task_type", TASK_TYPES)
async def test_a_task_with_an_unknown_field_takes_nothing(
    engine: EngineApp, task_type: str, protocol: str, stream: bool
) -> None:
    account = await engine.account("limited")
    spec, unknown = small_task(task_type), b"\xba\x3e\x01x"
    for options, field in ((TaskOptions(), task_type), (TaskOptions.FromString(unknown), None)):
        if field is not None:
            getattr(spec, task_type).MergeFromString(unknown)
        else:
            spec = small_task(task_type)
        answer = await engine.ask(account, spec, options=options, protocol=protocol, stream=stream)
        assert answer.error is not None
        assert (answer.code, answer.error.field) == ("invalid_parameter", field)
        assert "Unknown field 999" in answer.error.message
    assert (await engine.used(account)).requests == 0


@pytest.mark.parametrize("size", [1, LARGE])
async def test_an_unknown_field_is_refused_in_a_task_of_any_size(engine: EngineApp, size: int) -> None:
    spec = text_task("x" * size)
    spec.text.MergeFromString(b"\xba\x3e\x01x")
    answer = await engine.ask(await engine.account(), spec)
    assert (answer.code, answer.error and answer.error.field) == ("invalid_parameter", "text")


@STREAM
@PROTOCOL
async def test_a_task_without_an_input_lacks_its_first_field(
    engine: EngineApp, protocol: str, stream: bool
) -> None:
    spec = TaskSpec(model="gpt-4")
    answer = await engine.ask(await engine.account(), spec, protocol=protocol, stream=stream)
    assert (answer.code, answer.error and answer.error.field) == ("missing_parameter", "messages")


async def exhausted(engine: EngineApp) -> Account:
    """An account that has used all requests of this minute."""
    account = await engine.account("one request")
    assert (await engine.ask(account, TEXT)).code == "ok"
    return account


def transcription(media_id: str, **fields: Any) -> TaskSpec:
    """A task that refers to an upload."""
    task = to_task({"model": "eleven-labs-stt", **fields})
    task.speech_to_text.audio.media_id = media_id
    return task


@STREAM
@pytest.mark.parametrize(
    "code",
    ["invalid_parameter", "rate_limit_exceeded", "insufficient_credits", "provider_not_configured"],
)
async def test_the_upload_of_a_refused_rest_request_is_deleted(
    engine: EngineApp, code: str, stream: bool
) -> None:
    if code == "rate_limit_exceeded":
        account = await exhausted(engine)
    else:
        account = await engine.account(micros=0 if code == "insufficient_credits" else CREDITS)
    task = transcription(await engine.upload(account, AUDIO))
    if code == "invalid_parameter":
        task.speech_to_text.num_speakers = 1_000
    assert len(engine.media()) == 1
    assert (await engine.ask(account, task, stream=stream)).code == code
    assert engine.media() == []
