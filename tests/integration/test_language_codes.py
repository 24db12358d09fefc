"""Languages of transcripts and of requests, over every protocol, with live and test keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from pomelo.testing import Transcript
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS, GrpcDriver, Outcome, RestDriver, TaskRequest
from tests.tasks import TASK_BODIES

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("languages")) as opened:
        yield opened


async def ask(
    house: RunningApp, way: str, key: str, body: Mapping[str, Any], stream: bool = False
) -> Outcome:
    """One task, with the language of its answer."""
    client = GrpcDriver(house.channel) if way == "grpc" else RestDriver(house.session, house.urls[way])
    return await client(TaskRequest(body, key, stream))


@WAY
@HOW
@pytest.mark.parametrize(
    ("reported", "language"),
    [("eng", "en"), ("en", "en"), ("EN", "en"), ("en-US", "en"), ("haw", "haw"), ("English", ""), ("", "")],
)
async def test_a_transcript_names_its_language_by_the_shortest_code(
    house: RunningApp, way: str, stream: bool, reported: str, language: str
) -> None:
    caller = await house.account()
    house.upstream.script(Transcript("Hi there.", language=reported))
    outcome = await ask(house, way, caller.live, TASK_BODIES["stt"], stream)
    assert (outcome.code, outcome.output["language"]) == ("ok", language)


@WAY
@pytest.mark.parametrize(
    ("given", "language"), [(None, "en"), ("eng", "en"), ("de-AT", "de"), ("haw", "haw")]
)
async def test_a_test_key_gets_the_same_form(
    house: RunningApp, way: str, given: str | None, language: str
) -> None:
    caller = await house.account()
    more = {} if given is None else {"language_code": given}
    outcome = await ask(house, way, caller.test, TASK_BODIES["stt"] | more)
    assert (outcome.code, outcome.output["language"]) == ("ok", language)


@WAY
@pytest.mark.parametrize("given", ["en", "eng", "EN", "en-US"])
async def test_a_language_reaches_the_vendor_in_its_own_form(house: RunningApp, way: str, given: str) -> None:
    caller = await house.account()
    outcome = await ask(house, way, caller.live, TASK_BODIES["stt"] | {"language_code": given})
    assert outcome.code == "ok"
    form = house.upstream.requests[-1].form
    assert form is not None
    assert {part.name: part.text for part in form if part.filename is None}["language_code"] == "en"


@WAY
@pytest.mark.parametrize("kind", ["stt", "tts"])
@pytest.mark.parametrize("given", ["xx1", "english", "zz", "xyz", "und", "e" * 200])
async def test_what_is_no_language_is_refused_with_the_field_and_what_is_taken(
    house: RunningApp, way: str, kind: str, given: str
) -> None:
    caller = await house.account()
    before = len(house.upstream.requests)
    for key in (caller.live, caller.test):
        outcome = await ask(house, way, key, TASK_BODIES[kind] | {"language_code": given})
        assert outcome.code == "invalid_parameter"
        assert outcome.message == (
            "Invalid language_code: must be an ISO 639 code, such as en, eng or haw, or a language tag, such as en-US"
        )
    assert len(house.upstream.requests) == before


@WAY
@pytest.mark.parametrize("given", ["en", "eng", "EN", "en-US", "haw"])
async def test_text_to_speech_takes_every_form(house: RunningApp, way: str, given: str) -> None:
    caller = await house.account()
    for key in (caller.live, caller.test):
        assert (await ask(house, way, key, TASK_BODIES["tts"] | {"language_code": given})).code == "ok"
