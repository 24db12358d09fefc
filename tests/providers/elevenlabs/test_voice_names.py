"""Voices by name: the list of the account, read by the ElevenLabs provider."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pomelo.providers.elevenlabs import elevenlabs
from pomelo.providers.elevenlabs.voices import DEFAULTS
from pomelo.testing import FaultUpstream, Gate, Received, Reply, Script, Speech, Stop, VoiceList
from pomelo.testing.elevenlabs_protocol import error_reply
from pomelo.testing.reply import json_reply
from tests.providers.elevenlabs.rig import failure, job, read_audio, say
from tests.providers.rig import Rig

MINE = (
    ("Sarah - Mine", "A" * 20),
    ("Otto - The Great", "B" * 20),
    ("otto", "C" * 20),
    ("Otto", "D" * 20),
    ("Anna, calm", "E" * 20),
    ("Evil", "../../v1/user"),
    ("  ", "F" * 20),
    ("Zoë de Vries", "G" * 20),
    ("Onyx", "H" * 20),
)


def answer_lists(vendor: FaultUpstream, script: Script) -> None:
    """Lets the vendor answer requests for the list of voices by a script, and speak."""

    def answer(received: Received) -> Reply:
        if not _lists(received):
            return Speech()(received)
        return script if isinstance(script, Reply) else script(received)

    vendor.unscripted = None
    vendor.default = answer


def listing(vendor: FaultUpstream, *voices: tuple[str, str]) -> None:
    """Lets the vendor list these voices, and speak."""
    answer_lists(vendor, VoiceList(voices))


def _lists(received: Received) -> bool:
    return received.path.endswith("/voices")


def speak(voice: str) -> Any:
    """A job for a voice."""
    return job(say(voice=voice))


def lists(vendor: FaultUpstream) -> int:
    """Returns the number of requests for the list."""
    return sum(_lists(received) for received in vendor.requests)


@pytest.mark.parametrize(
    ("voice", "used"),
    [
        ("sarah", "A" * 20),
        ("sarah - mine", "A" * 20),
        ("adam", DEFAULTS["adam"]),
        ("alloy", DEFAULTS["river"]),
        ("Onyx", "H" * 20),
        ("otto", "C" * 20),
        ("OTTO", "C" * 20),
        ("Otto  - the great", "B" * 20),
        ("anna", "E" * 20),
        ("zoë", "G" * 20),
        ("Zoë de Vries", "G" * 20),
    ],
)
async def test_a_voice_is_found_by_its_name_or_its_first_word(rig: Rig, voice: str, used: str) -> None:
    listing(rig, *MINE)
    await read_audio(rig.provider, speak(voice))
    assert rig.requests[-1].path.endswith(used)


@pytest.mark.parametrize("voice", ["nobody", "evil", "de", "sarah-", "x" * 19, "X" * 21])
async def test_an_unknown_voice_is_the_callers_mistake(rig: Rig, voice: str) -> None:
    listing(rig, *MINE)
    error, _ = await failure(rig.provider, speak(voice))
    assert (error.code, error.field) == ("invalid_parameter", "voice")
    assert "voice" in error.message
    assert [_lists(received) for received in rig.requests] == [True]


async def test_a_long_list_is_read_page_by_page_and_cached(rig: Rig) -> None:
    listing(rig, *((f"Nr{number} - A voice", f"{number:020d}") for number in range(250)))
    for _ in range(3):
        await read_audio(rig.provider, speak("nr249"))
    await failure(rig.provider, speak("nr250"))
    speech_job = [received for received in rig.requests if _lists(received)]
    assert [received.query.get("next_page_token") for received in speech_job] == [None, "100", "200"]
    assert {received.query["page_size"] for received in speech_job} == {"100"}
    assert {received.query["include_total_count"] for received in speech_job} == {"false"}
    assert speech_job[0].method == "GET"


async def test_a_page_without_a_further_one_is_the_last_whatever_its_token(rig: Rig) -> None:
    body = b'{"voices": [{"name": "Otto", "voice_id": "%b"}], "has_more": false, "next_page_token": "1"}'
    answer_lists(rig, Reply(steps=(body % (b"B" * 20),)))
    await read_audio(rig.provider, speak("otto"))
    assert lists(rig) == 1


@pytest.mark.parametrize(
    "odd", [None, 7, [], {"name": "Otto"}, {"voice_id": "C" * 20}, {"name": "Otto", "voice_id": None}]
)
async def test_a_voice_without_a_name_or_an_id_spoils_no_other(rig: Rig, odd: Any) -> None:
    voices = [odd, {"name": "Otto", "voice_id": "B" * 20}, odd]
    answer_lists(rig, json_reply({"voices": voices, "has_more": False}))
    await read_audio(rig.provider, speak("otto"))
    assert rig.requests[-1].path.endswith("B" * 20)


@pytest.mark.parametrize(
    "body",
    [
        *(None, [], {}),
        *({"voices": voices} for voices in (None, "x", {"name": "Otto"}, [{"name": "Otto"}])),
        *({"voices": [], "has_more": True, "next_page_token": token} for token in (7, ["1"])),
    ],
)
async def test_a_list_of_another_shape_is_not_the_callers_mistake(rig: Rig, body: Any) -> None:
    answer_lists(rig, json_reply(body))
    error, _ = await failure(rig.provider, speak("otto"))
    assert (error.code, lists(rig)) == ("provider_failed", 1)


async def test_a_list_that_does_not_arrive_in_time_is_unavailable(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elevenlabs, "_LIST_TIMEOUT", 0.02)
    answer_lists(rig, Reply(before=(Gate(),)))
    error, _ = await failure(rig.provider, speak("otto"))
    assert (error.code, error.message) == (
        "provider_unavailable",
        "The provider did not send its list of voices. Use a voice's id",
    )


async def test_calls_that_wait_for_the_list_share_one_read(rig: Rig) -> None:
    gate = Gate()
    answer_lists(rig, VoiceList(MINE, before=(gate,)))
    calls = [asyncio.create_task(read_audio(rig.provider, speak("otto"))) for _ in range(10)]
    await gate.reached.wait()
    await read_audio(rig.provider, speak("A" * 20))  # a voice id does not wait
    calls.pop(0).cancel()
    gate.open()
    await asyncio.gather(*calls)
    assert lists(rig) <= 2, "one for the call that left, one for all others"


async def test_a_list_that_fails_fails_all_that_wait_for_it_once(rig: Rig) -> None:
    gate = Gate()
    refusal = error_reply(429, "system_busy", error_type="rate_limit_error", headers={"Retry-After": "7"})
    rig.script(Reply(refusal.status, refusal.headers, refusal.steps, before=(gate,)))
    listing(rig, *MINE)
    calls = [asyncio.create_task(failure(rig.provider, speak("otto"))) for _ in range(10)]
    await gate.reached.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    gate.open()
    errors = [error for error, _ in await asyncio.gather(*calls)]
    assert {(error.code, error.retry_after) for error in errors} == {("provider_unavailable", 7)}
    assert len(set(map(id, errors))) == 10, "one exception was raised in several tasks"
    assert lists(rig) == 1
    await read_audio(rig.provider, speak("otto"))  # and the next one tries again


@pytest.mark.parametrize(
    "reply",
    [
        Reply(steps=(b"[]",)),
        Reply(steps=(b'{"voices": {}, "has_more": true, "next_page_token": 7}',)),
        Reply(steps=(b'{"voices": [7]}',)),
        Reply(steps=(b"<html>",)),
        Reply(before=(Stop.CLOSE,)),
        error_reply(401, "unauthorized", legacy="missing_permissions", error_type="authentication_error"),
    ],
)
async def test_an_unreadable_list_is_reported_as_provider_failed(rig: Rig, reply: Reply) -> None:
    answer_lists(rig, reply)
    error, _ = await failure(rig.provider, speak("otto"))
    assert error.code in ("provider_failed", "provider_unavailable")
    assert {_lists(received) for received in rig.requests} == {True}, "it spoke without a voice"


async def test_a_list_without_an_end_is_read_for_a_limited_time(rig: Rig) -> None:
    answer_lists(rig, Reply(steps=(b'{"voices": [], "has_more": true, "next_page_token": "1"}',)))
    error, _ = await failure(rig.provider, speak("otto"))
    assert error.field == "voice"
    assert lists(rig) == 50
