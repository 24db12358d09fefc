"""Language codes of transcripts and of requests, on every protocol, with live and test keys."""

from __future__ import annotations

import pytest

from pomelo.testing import Transcript
from tests.app import RunningApp, app_fixture
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM
from tests.tasks import TASK_BODIES

app = app_fixture()


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    ("reported", "language"),
    [
        ("eng", "en"),
        ("en", "en"),
        ("EN", "en"),
        ("en-US", "en"),
        ("haw", "haw"),
        (" eng ", "en"),
        ("English", ""),
        ("", ""),
    ],
)
async def test_a_transcript_has_the_shortest_code_of_its_language(
    app: RunningApp, protocol: str, stream: bool, reported: str, language: str
) -> None:
    caller = await app.account()
    app.upstream.script(Transcript("Hi there.", language=reported))
    outcome = await app.ask(protocol, caller.live, TASK_BODIES["stt"], stream=stream)
    assert (outcome.code, outcome.output["language"]) == ("ok", language)


@PROTOCOL
@pytest.mark.parametrize(("code", "language"), [(None, "en"), ("eng", "en"), ("de-AT", "de"), ("haw", "haw")])
async def test_a_test_key_gets_the_same_code(
    app: RunningApp, protocol: str, code: str | None, language: str
) -> None:
    caller = await app.account()
    more = {} if code is None else {"language_code": code}
    outcome = await app.ask(protocol, caller.test, TASK_BODIES["stt"] | more)
    assert (outcome.code, outcome.output["language"]) == ("ok", language)


@PROTOCOL
@pytest.mark.parametrize("code", ["en", "eng", "EN", "en-US"])
async def test_the_vendor_gets_the_code_in_its_own_format(app: RunningApp, protocol: str, code: str) -> None:
    caller = await app.account()
    outcome = await app.ask(protocol, caller.live, TASK_BODIES["stt"] | {"language_code": code})
    assert outcome.code == "ok"
    form = app.upstream.requests[-1].form
    assert form is not None
    assert {part.name: part.text for part in form if part.filename is None}["language_code"] == "en"


@PROTOCOL
@pytest.mark.parametrize("name", ["stt", "tts"])
@pytest.mark.parametrize("code", ["xx1", "english", "zz", "xyz", "und", "e" * 200])
async def test_an_unknown_language_is_refused_with_the_field_and_the_valid_formats(
    app: RunningApp, protocol: str, name: str, code: str
) -> None:
    caller = await app.account()
    before = len(app.upstream.requests)
    for key in (caller.live, caller.test):
        outcome = await app.ask(protocol, key, TASK_BODIES[name] | {"language_code": code})
        assert outcome.code == "invalid_parameter"
        assert outcome.message == (
            "Invalid language_code: must be an ISO 639 code, such as en, eng or haw, or a language tag, such as en-US"
        )
    assert len(app.upstream.requests) == before


@PROTOCOL
@pytest.mark.parametrize("code", ["en", "eng", "EN", "en-US", "haw"])
async def test_text_to_speech_takes_every_format(app: RunningApp, protocol: str, code: str) -> None:
    caller = await app.account()
    for key in (caller.live, caller.test):
        assert (await app.ask(protocol, key, TASK_BODIES["tts"] | {"language_code": code})).code == "ok"
