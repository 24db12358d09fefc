"""Languages of transcripts and of requests, over every protocol, with live and test keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from pomelo.testing import Transcript
from tests.integration.house import KINDS, WAYS, House, open_house
from tests.parity.clients import Ask, Grpc, Outcome, Rest

WAY = pytest.mark.parametrize("way", WAYS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("languages")) as opened:
        yield opened


async def ask(house: House, way: str, key: str, body: Mapping[str, Any], stream: bool = False) -> Outcome:
    """One task, with the language of its answer."""
    client = Grpc(house.channel) if way == "grpc" else Rest(house.session, house.urls[way])
    return await client(Ask(body, key, stream))


@WAY
@HOW
@pytest.mark.parametrize(
    ("reported", "language"),
    [("eng", "en"), ("en", "en"), ("EN", "en"), ("en-US", "en"), ("haw", "haw"), ("English", ""), ("", "")],
)
async def test_a_transcript_names_its_language_by_the_shortest_code(
    house: House, way: str, stream: bool, reported: str, language: str
) -> None:
    caller = await house.caller()
    house.upstream.script(Transcript("Hi there.", language=reported))
    outcome = await ask(house, way, caller.live, KINDS["stt"], stream)
    assert (outcome.code, outcome.output["language"]) == ("ok", language)


@WAY
@pytest.mark.parametrize(
    ("given", "language"), [(None, "en"), ("eng", "en"), ("de-AT", "de"), ("haw", "haw")]
)
async def test_a_test_key_gets_the_same_form(
    house: House, way: str, given: str | None, language: str
) -> None:
    caller = await house.caller()
    more = {} if given is None else {"language_code": given}
    outcome = await ask(house, way, caller.test, KINDS["stt"] | more)
    assert (outcome.code, outcome.output["language"]) == ("ok", language)


@WAY
@pytest.mark.parametrize("given", ["en", "eng", "EN", "en-US"])
async def test_a_language_reaches_the_vendor_in_its_own_form(house: House, way: str, given: str) -> None:
    caller = await house.caller()
    outcome = await ask(house, way, caller.live, KINDS["stt"] | {"language_code": given})
    assert outcome.code == "ok"
    form = house.upstream.requests[-1].form
    assert form is not None
    assert {part.name: part.text for part in form if part.filename is None}["language_code"] == "en"


@WAY
@pytest.mark.parametrize("kind", ["stt", "tts"])
@pytest.mark.parametrize("given", ["xx1", "english", "zz", "xyz", "und", "e" * 200])
async def test_what_is_no_language_is_refused_with_the_field_and_what_is_taken(
    house: House, way: str, kind: str, given: str
) -> None:
    caller = await house.caller()
    before = len(house.upstream.requests)
    for key in (caller.live, caller.test):
        outcome = await ask(house, way, key, KINDS[kind] | {"language_code": given})
        assert outcome.code == "invalid_parameter"
        assert outcome.message == (
            "Invalid language_code: must be an ISO 639 code, such as en, eng or haw, or a language tag, such as en-US"
        )
    assert len(house.upstream.requests) == before


@WAY
@pytest.mark.parametrize("given", ["en", "eng", "EN", "en-US", "haw"])
async def test_text_to_speech_takes_every_form(house: House, way: str, given: str) -> None:
    caller = await house.caller()
    for key in (caller.live, caller.test):
        assert (await ask(house, way, key, KINDS["tts"] | {"language_code": given})).code == "ok"
