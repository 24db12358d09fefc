"""Failures of the ElevenLabs protocol, and callers who disconnect."""

from __future__ import annotations

import asyncio
import gzip
import socket
from typing import Any

import pytest

from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Timeouts
from pomelo.testing import Gate, Reply, Script, Speech, Stop, Transcript, page, redirect
from pomelo.testing.elevenlabs_checks import problem
from pomelo.testing.elevenlabs_protocol import error_reply, validation_reply
from tests.providers.elevenlabs.rig import MAKE, failure, job, read_audio, say, transcript
from tests.providers.rig import (
    SECRETS,
    Rig,
    check_left,
    check_no_secrets,
    open_provider,
    read_all,
    run,
)
from tests.waiting import cancel

JOBS = {
    "tts": job(),
    "tts-stream": job(stream=True),
    "sts": job(SpeechToSpeechInput(voice="adam")),
    "sts-stream": job(SpeechToSpeechInput(voice="adam"), stream=True),
    "stt": job(SpeechToTextInput()),
}
SPEAKING = pytest.mark.parametrize(
    "speech_job", [JOBS[name] for name in JOBS if name != "stt"], ids=list(JOBS)[:4]
)
ALL = pytest.mark.parametrize("speech_job", JOBS.values(), ids=JOBS)


def refusal(status: int, code: str = "", **what: Any) -> Reply:
    """A refusal whose message repeats secrets."""
    return error_reply(status, code, message=SECRETS, **what)


RATE = {"error_type": "rate_limit_error"}
STATUSES = [
    (refusal(400, "invalid_parameters"), "provider_failed", None, None),
    (refusal(400, "max_character_limit_exceeded"), "context_length_exceeded", None, "text"),
    (refusal(400, "max_character_limit_exceeded", shape="old"), "context_length_exceeded", None, "text"),
    (refusal(400, "text_too_long", error_type="validation_error"), "context_length_exceeded", None, "text"),
    (refusal(400, "x", param="voice_settings.speed"), "invalid_parameter", None, "voice_settings.speed"),
    (refusal(400, "x", param="output_format"), "invalid_parameter", None, "output_format"),
    (refusal(400, "voice_not_found", shape="old"), "invalid_parameter", None, "voice"),
    (refusal(400, "voice_does_not_exist", shape="old"), "invalid_parameter", None, "voice"),
    (refusal(400, "invalid_voice_id", error_type="validation_error"), "invalid_parameter", None, "voice"),
    (refusal(400, "invalid_voice_settings", error_type="validation_error"), "invalid_parameter", None,
     "voice_settings"),
    (refusal(400, "invalid_content", shape="old"), "invalid_parameter", None, "audio"),
    (refusal(400, "invalid_audio_format", error_type="validation_error"), "invalid_parameter", None, "audio"),
    (refusal(400, "empty_text", error_type="validation_error"), "invalid_parameter", None, "text"),
    (refusal(400, shape="text"), "provider_failed", None, None),
    (refusal(401, "unauthorized", legacy="invalid_api_key"), "provider_failed", None, None),
    (refusal(401, "invalid_api_key", shape="old"), "provider_failed", None, None),
    (refusal(401, "quota_exceeded", shape="old"), "provider_failed", None, None),
    (refusal(401, "a_new_one", error_type="authentication_error"), "provider_failed", None, None),
    (refusal(402, "insufficient_credits", error_type="payment_required"), "provider_failed", None, None),
    (refusal(402, shape="text"), "provider_failed", None, None),
    (refusal(403, "content_against_policy", shape="old"), "content_policy_violation", None, None),
    (refusal(403, "content_against_policy", error_type="authorization_error"), "content_policy_violation",
     None, None),
    (refusal(403, "a_new_one", error_type="authorization_error"), "provider_failed", None, None),
    (refusal(404, "voice_not_found", error_type="not_found", param="voice_id"), "invalid_parameter", None, "voice"),
    (refusal(404, "model_not_found", error_type="not_found"), "provider_failed", None, None),
    (refusal(409, "x", error_type="conflict"), "provider_unavailable", 5, None),
    (validation_reply(problem("missing", "body", "text", value=SECRETS)), "invalid_parameter", None, "text"),
    (validation_reply(problem("x", "body", "voice_settings", "style")), "invalid_parameter", None,
     "voice_settings.style"),
    (validation_reply(problem("x", "body", "voice_settings", SECRETS)), "invalid_parameter", None,
     "voice_settings"),
    (validation_reply(problem("x", "query", "output_format")), "invalid_parameter", None, "output_format"),
    (validation_reply(problem("x", "path", "voice_id")), "invalid_parameter", None, "voice"),
    (validation_reply(problem("x", "body", "file")), "invalid_parameter", None, "audio"),
    (validation_reply(problem("x", "body", "audio")), "invalid_parameter", None, "audio"),
    (validation_reply(problem("x", "body", "num_speakers")), "invalid_parameter", None, "num_speakers"),
    (validation_reply(problem("x", "body", "timestamps_granularity")), "invalid_parameter", None,
     "timestamps"),
    (validation_reply(problem("x", "body", "model_id", 7)), "provider_failed", None, None),
    (validation_reply(), "provider_failed", None, None),
    (Reply(422, steps=(b'{"detail":[7]}',)), "provider_failed", None, None),
    (Reply(422, steps=(b'{"detail":[{"loc":7}]}',)), "provider_failed", None, None),
    (Reply(400, steps=(b'{"detail":{"code":7,"param":[]}}',)), "provider_failed", None, None),
    (Reply(400, steps=(b"[]",)), "provider_failed", None, None),
    (refusal(429, "rate_limit_exceeded", **RATE), "provider_unavailable", 5, None),
    (refusal(429, "concurrent_limit_exceeded", legacy="too_many_concurrent_requests",
          headers={"Retry-After": "3"}, **RATE), "provider_unavailable", 3, None),
    (refusal(429, "too_many_concurrent_requests", shape="old"), "provider_unavailable", 5, None),
    (refusal(429, "system_busy", headers={"retry-after-ms": "1200"}, **RATE), "provider_unavailable", 2, None),
    (refusal(429, "quota_exceeded", shape="old"), "provider_failed", None, None),
    (refusal(429, shape="text"), "provider_unavailable", 5, None),
    (refusal(500, "internal_error", error_type="internal_error"), "provider_unavailable", 5, None),
    (refusal(503, error_type="service_unavailable"), "provider_unavailable", 5, None),
    (page(403), "provider_failed", None, None),
    (Reply(500, steps=(b"x" * 200_000,)), "provider_unavailable", 5, None),
    (Reply(429, {"Retry-After": "3"}, steps=(b'{"det', Stop.CLOSE)), "provider_unavailable", 3, None),
    (redirect("/elevenlabs/v1/text-to-speech/x", 307), "provider_failed", None, None),
]  # fmt: skip


@ALL
@pytest.mark.parametrize(("reply", "code", "wait", "field"), STATUSES)
async def test_a_status_is_mapped_to_an_error(
    rig: Rig, speech_job: Any, reply: Reply, code: str, wait: int | None, field: str
) -> None:
    rig.script(reply)
    error, received_audio = await failure(rig.provider, speech_job)
    assert (error.code, error.retry_after, error.field, received_audio) == (code, wait, field, b"")
    check_no_secrets(error)
    assert len(rig.requests) == 1, "it was sent twice"


@pytest.mark.parametrize("shape", ["new", "old"])
async def test_a_text_that_is_too_long_for_the_vendor_is_named(rig: Rig, shape: str) -> None:
    rig.script(refusal(400, "max_character_limit_exceeded", shape=shape))
    error, _ = await failure(rig.provider, job())
    assert error.message == "text is longer than the provider takes. Shorten it"


AUDIO = {"Content-Type": "audio/mpeg"}
NO_SOUND: list[Script] = [
    Reply(headers={**AUDIO, "Content-Length": "0"}),
    Reply(204, headers=AUDIO),
    Reply(headers=AUDIO, steps=(b"<!doctype html>",)),
    Reply(headers=AUDIO, steps=(b"\n\n <", b"html>")),
    Reply(headers=AUDIO, steps=(b'{"detail": "%s"}' % SECRETS.encode(),)),
    Reply(headers={"Content-Type": "application/json"}, steps=(b"{}",)),
    Reply(headers={"Content-Type": "application/problem+json"}, steps=(b"ID3....",)),
    Reply(headers=AUDIO, steps=(b"ID3",)),
    Reply(headers=AUDIO, steps=(b"Service temporarily unavailable, please retry",)),
    Reply(headers=AUDIO, steps=(b"S", b"orry, please retry")),
    Reply(headers=AUDIO, steps=(b"\xef\xbb\xbf" + b'{"detail": "none today"}',)),
    Reply(headers=AUDIO, steps=("Not today, not today".encode("utf-16"),)),
    Reply(headers=AUDIO, steps=(gzip.compress(b"ID3....." * 10),)),
    Reply(headers=AUDIO, steps=(b"\x89PNG\r\n\x1a\n" + bytes(100),)),
    Reply(headers=AUDIO, steps=(bytes(1000),)),
    Reply(headers={**AUDIO, "Content-Encoding": "gzip"}, steps=(gzip.compress(b"ID3..."),)),
    Reply(before=(b"HTTP/1.0 200 OK\r\nContent-Type: audio/mpeg\r\n\r\nID3" + bytes(99), Stop.CLOSE)),
    Speech(at={0: Stop.END}),
]


@SPEAKING
@pytest.mark.parametrize("script", NO_SOUND)
async def test_a_response_that_is_not_audio_is_mapped_to_an_error(
    rig: Rig, speech_job: Any, script: Script
) -> None:
    rig.script(script)
    error, received_audio = await failure(rig.provider, speech_job)
    assert (error.code, received_audio) == ("provider_failed", b"")
    check_no_secrets(error)
    assert len(rig.requests) == 1, "it was sent twice"


@pytest.mark.parametrize("audio_format", ["pcm_16000", "ulaw_8000", "alaw_8000"])
@pytest.mark.parametrize("kind", ["audio/mpeg", "application/octet-stream", ""])
@pytest.mark.parametrize(
    "answer",
    [
        b"Service temporarily unavailable, please retry",
        b'{"detail": "none today"}',
        b'\xef\xbb\xbf{"detail": "none today"}',
        b"<!doctype html><html></html>",
        "Not today, not today".encode("utf-16"),
        gzip.compress(b"some words", mtime=0),
    ],
)
async def test_text_with_another_content_type_is_not_samples(
    rig: Rig, audio_format: str, kind: str, answer: bytes
) -> None:
    rig.script(Reply(headers={"Content-Type": kind}, steps=(answer[:3], answer[3:])))
    speech_input = say(output_format=audio_format)
    error, received_audio = await failure(rig.provider, job(speech_input))
    assert (error.code, received_audio) == ("provider_failed", b"")
    check_no_secrets(error)


@SPEAKING
@pytest.mark.parametrize("length", [False, True], ids=["chunks", "length"])
@pytest.mark.parametrize("stop", [Stop.CLOSE, Stop.RESET])
async def test_truncated_audio_never_looks_complete(
    rig: Rig, speech_job: Any, stop: Stop, length: bool
) -> None:
    gate = Gate()
    rig.script(Speech(size=50_000, at={2: (gate, stop)}, length=length))
    received_audio = b""
    with pytest.raises(Exception) as raised:  # noqa: PT011, PT012
        async for event in run(rig.provider, speech_job):
            received_audio += event.audio_chunk.data
            if gate.reached.is_set():
                gate.open()
    assert getattr(raised.value, "code", None) == "provider_failed"
    assert 0 < len(received_audio) < 50_000
    check_no_secrets(raised.value)


async def test_audio_that_is_shorter_than_its_length_never_looks_complete(rig: Rig) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Length: 100\r\n\r\nID3........."
    rig.script(Reply(before=(raw, Stop.CLOSE)))
    error, received_audio = await failure(rig.provider, job(stream=True))
    assert (error.code, received_audio) == ("provider_failed", b"ID3.........")


NO_TRANSCRIPT: list[tuple[Script, str]] = [
    (Reply(204), "provider_failed"),
    (Reply(steps=(b"[]",)), "provider_failed"),
    (Reply(steps=(b"null",)), "provider_failed"),
    (Reply(steps=(b'"text"',)), "provider_failed"),
    (Reply(steps=(b'{"text":7}',)), "provider_failed"),
    (Reply(steps=(b'{"text":null,"words":[]}',)), "provider_failed"),
    (Reply(steps=(b'{"text":"caf\xc3","words":[]}',)), "provider_failed"),
    (Reply(steps=(b'{"transcripts":[]}',)), "provider_failed"),
    (Reply(steps=(b'{"message":"ok","request_id":"x"}',)), "provider_failed"),
    (Reply(steps=(b'{"detail":{"code":"system_busy","message":"%s"}}' % SECRETS.encode(),)),
     "provider_unavailable"),
    (Reply(headers={"Content-Encoding": "gzip"}, steps=(gzip.compress(b'{"text":"x"}'),)), "provider_failed"),
    (Reply(headers={"Content-Length": "99000000"}, steps=(b"{", Gate())), "provider_failed"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "code"), NO_TRANSCRIPT)
async def test_a_response_that_is_not_a_transcript_is_mapped_to_an_error(
    rig: Rig, script: Script, code: str
) -> None:
    rig.script(script)
    error, _ = await failure(rig.provider, JOBS["stt"])
    assert isinstance(error, UpstreamError)
    assert (error.code, error.retry) == (code, RetryPolicy.NEVER)
    check_no_secrets(error)
    assert len(rig.requests) == 1, "it was sent twice"


@pytest.mark.parametrize("name", ["tts", "sts", "stt"])
async def test_unary_answers_have_a_longer_timeout_than_the_silence_of_a_stream(rig: Rig, name: str) -> None:
    rig.script((Transcript if name == "stt" else Speech)(before=(0.2,)))
    async with open_provider(
        MAKE, rig.elevenlabs_base_url, timeouts=Timeouts(silence=0.05, whole=5)
    ) as provider:
        assert [event async for event in run(provider, JOBS[name])]


async def test_audio_that_arrives_slowly_is_not_silence(rig: Rig) -> None:
    # In all it takes longer than it may be silent.
    rig.script(Speech(size=20_000, at=dict.fromkeys(range(1, 5), 0.4)))
    async with open_provider(MAKE, rig.elevenlabs_base_url, timeouts=Timeouts(silence=1.5)) as provider:
        assert len((await read_audio(provider, job(stream=True)))[0]) >= 20_000


@ALL
async def test_a_refused_connection_is_an_unavailable_provider(speech_job: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        async with open_provider(MAKE, f"http://127.0.0.1:{taken.getsockname()[1]}") as provider:
            error, _ = await failure(provider, speech_job)
    assert isinstance(error, UpstreamError)
    assert (error.code, error.retry) == ("provider_unavailable", RetryPolicy.SAME_ROUTE)
    check_no_secrets(error)


@ALL
@pytest.mark.parametrize(
    ("reply", "retry"),
    [
        (Reply(before=(Stop.CLOSE,)), RetryPolicy.NEVER),
        (Reply(before=(Stop.RESET,)), RetryPolicy.NEVER),
        (error_reply(500, "internal_error"), RetryPolicy.NEVER),
        (error_reply(503, "service_unavailable"), RetryPolicy.NEVER),
        (error_reply(429, "system_busy"), RetryPolicy.SAME_ROUTE),
        (error_reply(402, "insufficient_credits"), RetryPolicy.NEXT_ROUTE),
    ],
)
async def test_a_request_that_may_have_been_charged_is_not_retried(
    rig: Rig, speech_job: Any, reply: Reply, retry: RetryPolicy
) -> None:
    rig.script(reply)
    error, _ = await failure(rig.provider, speech_job)
    assert isinstance(error, UpstreamError)
    assert error.retry == retry


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "nonsense"])
@ALL
async def test_an_invalid_address_is_provider_failed(url: str, speech_job: Any) -> None:
    async with open_provider(MAKE, url) as provider:
        error, _ = await failure(provider, speech_job)
    assert error.code == "provider_failed"


# --- leaving


async def test_cancelling_while_the_list_of_voices_is_read_closes_its_connection(rig: Rig) -> None:
    gate = Gate()
    rig.unscripted = None
    rig.script(Reply(before=(gate,)))
    task = asyncio.create_task(read_all(rig.provider, job(say(voice="otto"))))
    await gate.reached.wait()
    since = asyncio.get_running_loop().time()
    await cancel(task)
    await check_left(rig.requests[0], since)


async def test_after_a_refusal_the_next_call_is_served(rig: Rig) -> None:
    rig.script(error_reply(429, "system_busy"))
    await failure(rig.provider, JOBS["stt"])
    assert (await transcript(rig.provider, JOBS["stt"])).text
