"""Voices by name for a vendor account without the default voices, with live keys, on every protocol."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from pomelo.providers.elevenlabs.voices import DEFAULTS
from pomelo.testing import Received, Reply, Speech, VoiceList
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOL, Outcome
from tests.tasks import TASK_BODIES

OWN_ID, TABLE_ID = "AaOhDHYJ1XLZk74lXhdE", "B" * 20
OWN = (("Adam - My own", OWN_ID), ("Caleb", "D" * 20))
SPEECH_BODIES = [TASK_BODIES["tts"], TASK_BODIES["sts"]]


@asynccontextmanager
async def without_defaults(
    folder: Path, *listed: tuple[str, str], table: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[RunningApp, Account]]:
    """Runs an app with a table of the operator's voices, and creates an account. The vendor lists the voices in
    `listed`, accepts them, those of the table and `TABLE_ID`, and rejects all others."""
    catalog = folder / "catalog.toml"
    rows = [f'"{name}" = "{voice_id}"' for name, voice_id in (table or {}).items()]
    catalog.write_text("\n".join(["[voices]", *rows]), encoding="utf-8")
    voices = {TABLE_ID, *(voice_id for _, voice_id in listed)}

    def answer(received: Received) -> Reply:
        if any(voice in received.path for voice in voices):
            return Speech()(received)
        return error_reply(404, "voice_not_found", error_type="not_found", param="voice_id")

    async with run_app(folder, settings={"catalog": catalog}) as app:
        app.upstream.default = answer
        app.upstream.unscripted = lambda received: (
            VoiceList(listed)(received) if "/voices" in received.path else None
        )
        yield app, await app.account()


async def speak(app: RunningApp, protocol: str, key: str, voice: str) -> Outcome:
    """Runs a text-to-speech task with a voice."""
    return await app.ask(protocol, key, {**TASK_BODIES["tts"], "voice": voice})


@PROTOCOL
async def test_a_voice_is_found_in_the_operators_table_or_the_accounts_list(
    tmp_path: Path, protocol: str
) -> None:
    async with without_defaults(tmp_path, OWN[0], table={"Bella": TABLE_ID}) as (app, caller):
        for body in SPEECH_BODIES:
            response = await app.ask(protocol, caller.live, body)
            assert (response.code, OWN_ID in app.upstream.requests[-1].path) == ("ok", True)
            response = await app.ask(protocol, caller.live, {**body, "voice": "bella"})
            assert (response.code, TABLE_ID in app.upstream.requests[-1].path) == ("ok", True)


@PROTOCOL
async def test_a_deleted_voice_is_replaced_by_the_next_one_with_its_name_or_refused(
    tmp_path: Path, protocol: str
) -> None:
    async with without_defaults(tmp_path, *OWN, table={"adam": "C" * 20}) as (app, caller):
        response = await app.ask(protocol, caller.live, TASK_BODIES["tts"])
        requested = [request.path.split("/")[-1] for request in app.upstream.requests]
        assert (response.code, requested) == ("ok", ["C" * 20, OWN_ID])
        response = await speak(app, protocol, caller.live, "alice")
        assert (response.code, "caleb" in response.message) == ("invalid_parameter", True)
        assert (await app.balance(caller, live=True)).held == 0
        assert len(await app.records(caller)) == 1


NAMES = (
    "zo\u00eb",
    "\u674e\u96f7",
    "john's",
    "adam - deep, warm",
    "(old) Bob [2]",
    "R&D / test",
    "\u00c5sa",
    "x" * 64,
)


@PROTOCOL
async def test_names_of_any_script_and_punctuation_are_found(tmp_path: Path, protocol: str) -> None:
    listed = {name: f"{number:020d}" for number, name in enumerate(NAMES[:4])}
    table = {name: f"{number:020d}" for number, name in enumerate(NAMES[4:], start=4)}
    everything = (listed | table).items()
    async with without_defaults(tmp_path, *everything, table=table) as (app, caller):
        for name, voice_id in everything:
            for spelling in (name, name.upper(), unicodedata.normalize("NFD", name)):
                response = await speak(app, protocol, caller.live, spelling)
                assert response.code == "ok", (spelling, response.message)
                assert voice_id in app.upstream.requests[-1].path.split("/")


@PROTOCOL
async def test_an_unknown_voice_is_refused_with_valid_names_and_never_sent(
    tmp_path: Path, protocol: str
) -> None:
    listed = [(name, f"{number:020d}") for number, name in enumerate([*NAMES[:4], "y" * 65, "tab\tname"])]
    async with without_defaults(tmp_path, *listed) as (app, caller):
        for voice in ("nobody", "../../v2/voices", "..", "a/../b", "%2e%2e%2f", "a?b=c#d", "\\x", "."):
            response = await speak(app, protocol, caller.live, voice)
            assert response.code == "invalid_parameter", voice
            assert "voice" in response.message
            names = response.message.partition(", such as ")[2].partition(", or a voice's id")[0].split(", ")
            assert {"zo\u00eb", "\u674e\u96f7", "john's", "adam"} <= set(names)
            assert app.upstream.requests == []
        for name in names:
            assert (await speak(app, protocol, caller.live, name)).code == "ok", name


@PROTOCOL
async def test_an_invalid_name_is_refused_without_a_request_for_the_list(
    tmp_path: Path, protocol: str
) -> None:
    async with run_app(tmp_path) as app:
        caller = await app.account()
        list_requests = []
        app.upstream.unscripted = lambda received: list_requests.append(received.path)
        for key in (caller.live, caller.test):
            for voice in ("x" * 65, " ", "a\nb", "a\0b", "a\u202eb", "a\u2028b"):
                response = await speak(app, protocol, key, voice)
                assert response.code == "invalid_parameter", voice
                assert "a voice's name" in response.message, voice
        assert list_requests == []


@PROTOCOL
async def test_the_id_of_a_deleted_voice_is_refused_with_valid_names(tmp_path: Path, protocol: str) -> None:
    async with without_defaults(tmp_path, *OWN) as (app, caller):
        for body in SPEECH_BODIES:
            for voice_id in (DEFAULTS["adam"], "Z" * 20):
                response = await app.ask(protocol, caller.live, {**body, "voice": voice_id})
                assert response.code == "invalid_parameter"
                assert "Invalid voice: " in response.message
                assert "such as adam, caleb," in response.message
                assert voice_id in app.upstream.requests[-1].path.split("/")
        assert (await app.balance(caller, live=True)).held == 0
        assert await app.records(caller) == []
