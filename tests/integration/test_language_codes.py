"""Language codes of transcripts and of requests, on every protocol, with live and test keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from pomelo.testing import Transcript
from tests.integration.house import KINDS, WAYS, House, open_house
from tests.parity.clients import Ask, Grpc, Outcome, Rest

EACH_PROTOCOL = pytest.mark.parametrize("protocol", WAYS)
UNARY_AND_STREAM = pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])


@pytest.fixture(scope="module", name="server")
async def _server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("languages")) as server:
        yield server


async def ask(
    server: House, protocol: str, key: str, body: Mapping[str, Any], stream: bool = False
) -> Outcome:
    """Runs one task."""
    client = Grpc(server.channel) if protocol == "grpc" else Rest(server.session, server.urls[protocol])
    return await client(Ask(body, key, stream))


@EACH_PROTOCOL
@UNARY_AND_STREAM
@pytest.mark.parametrize(
    ("reported", "language"),
    [("eng", "en"), ("en", "en"), ("EN", "en"), ("en-US", "en"), ("haw", "haw"), ("English", ""), ("", "")],
)
async def test_a_transcript_has_the_shortest_code_of_its_language(
    server: House, protocol: str, stream: bool, reported: str, language: str
) -> None:
    caller = await server.caller()
    server.upstream.script(Transcript("Hi there.", language=reported))
    outcome = await ask(server, protocol, caller.live, KINDS["stt"], stream)
    assert (outcome.code, outcome.output["language"]) == ("ok", language)


@EACH_PROTOCOL
@pytest.mark.parametrize(("code", "language"), [(None, "en"), ("eng", "en"), ("de-AT", "de"), ("haw", "haw")])
async def test_a_test_key_gets_the_same_code(
    server: House, protocol: str, code: str | None, language: str
) -> None:
    caller = await server.caller()
    more = {} if code is None else {"language_code": code}
    outcome = await ask(server, protocol, caller.test, KINDS["stt"] | more)
    assert (outcome.code, outcome.output["language"]) == ("ok", language)


@EACH_PROTOCOL
@pytest.mark.parametrize("code", ["en", "eng", "EN", "en-US"])
async def test_the_vendor_gets_the_code_in_its_own_format(server: House, protocol: str, code: str) -> None:
    caller = await server.caller()
    outcome = await ask(server, protocol, caller.live, KINDS["stt"] | {"language_code": code})
    assert outcome.code == "ok"
    form = server.upstream.requests[-1].form
    assert form is not None
    assert {part.name: part.text for part in form if part.filename is None}["language_code"] == "en"


@EACH_PROTOCOL
@pytest.mark.parametrize("name", ["stt", "tts"])
@pytest.mark.parametrize("code", ["xx1", "english", "zz", "xyz", "und", "e" * 200])
async def test_an_unknown_language_is_refused_with_the_field_and_the_valid_formats(
    server: House, protocol: str, name: str, code: str
) -> None:
    caller = await server.caller()
    before = len(server.upstream.requests)
    for key in (caller.live, caller.test):
        outcome = await ask(server, protocol, key, KINDS[name] | {"language_code": code})
        assert outcome.code == "invalid_parameter"
        assert outcome.message == (
            "Invalid language_code: must be an ISO 639 code, such as en, eng or haw, or a language tag, such as en-US"
        )
    assert len(server.upstream.requests) == before


@EACH_PROTOCOL
@pytest.mark.parametrize("code", ["en", "eng", "EN", "en-US", "haw"])
async def test_text_to_speech_takes_every_format(server: House, protocol: str, code: str) -> None:
    caller = await server.caller()
    for key in (caller.live, caller.test):
        assert (await ask(server, protocol, key, KINDS["tts"] | {"language_code": code})).code == "ok"
