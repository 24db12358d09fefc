"""`voice: "adam"` on live keys of a vendor account without the default voices, over every protocol."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from pomelo.providers.elevenlabs.voices import DEFAULTS
from pomelo.testing import FaultUpstream, Received, Reply, Speech, VoiceList
from pomelo.testing.elevenlabs_wire import error_reply
from tests.app import run_app
from tests.driver import PROTOCOLS
from tests.tasks import TASK_BODIES

MINE, TABLE = "AaOhDHYJ1XLZk74lXhdE", "B" * 20
SPOKEN = [TASK_BODIES["tts"], TASK_BODIES["sts"]]


def without_defaults(upstream: FaultUpstream, *listed: tuple[str, str]) -> None:
    """Makes the vendor list these voices, accept them and `TABLE`, and reject all others."""
    voices = {TABLE, *(voice_id for _, voice_id in listed)}

    def answer(received: Received) -> Reply:
        if any(voice in received.path for voice in voices):
            return Speech()(received)
        return error_reply(404, "voice_not_found", kind="not_found", param="voice_id")

    upstream.default = answer
    upstream.aside = lambda received: VoiceList(listed)(received) if "/voices" in received.path else None


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_a_voice_is_found_in_the_operators_table_or_the_accounts_list(tmp_path: Path, way: str) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(f'[voices]\nBella = "{TABLE}"\n')
    async with run_app(tmp_path, settings={"catalog": catalog}) as house:
        caller = await house.account()
        without_defaults(house.upstream, ("Adam - My own", MINE))
        for body in SPOKEN:
            told = await house.ask(way, caller.live, body)
            assert (told.code, MINE in house.upstream.requests[-1].path) == ("ok", True)
            told = await house.ask(way, caller.live, {**body, "voice": "bella"})
            assert (told.code, TABLE in house.upstream.requests[-1].path) == ("ok", True)


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_a_deleted_voice_is_replaced_by_the_next_of_its_name_or_refused(
    tmp_path: Path, way: str
) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text('[voices]\nadam = "CCCCCCCCCCCCCCCCCCCC"\n')
    async with run_app(tmp_path, settings={"catalog": catalog}) as house:
        caller = await house.account()
        without_defaults(house.upstream, ("Adam - My own", MINE), ("Caleb", "D" * 20))
        told = await house.ask(way, caller.live, TASK_BODIES["tts"])
        asked = [request.path.split("/")[-1] for request in house.upstream.requests]
        assert (told.code, asked) == ("ok", ["C" * 20, MINE])
        told = await house.ask(way, caller.live, {**TASK_BODIES["tts"], "voice": "alice"})
        assert (told.code, "caleb" in told.message) == ("invalid_parameter", True)
        assert (await house.balance(caller, live=True)).held == 0
        assert len(await house.records(caller)) == 1


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


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_names_of_any_script_and_punctuation_are_found(tmp_path: Path, way: str) -> None:
    listed = {name: f"{number:020d}" for number, name in enumerate(NAMES[:4])}
    table = {name: f"{number:020d}" for number, name in enumerate(NAMES[4:], start=4)}
    catalog = tmp_path / "catalog.toml"
    rows = [f'"{name}" = "{voice_id}"' for name, voice_id in table.items()]
    catalog.write_text("\n".join(["[voices]", *rows]), encoding="utf-8")
    async with run_app(tmp_path, settings={"catalog": catalog}) as house:
        caller = await house.account()
        without_defaults(house.upstream, *listed.items(), *((name, i) for name, i in table.items()))
        for name, voice_id in (listed | table).items():
            for spelling in (name, name.upper(), unicodedata.normalize("NFD", name)):
                told = await house.ask(way, caller.live, {**TASK_BODIES["tts"], "voice": spelling})
                assert told.code == "ok", (spelling, told.message)
                assert voice_id in house.upstream.requests[-1].path.split("/")


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_an_unknown_voice_is_refused_with_names_that_work_and_reaches_no_url(
    tmp_path: Path, way: str
) -> None:
    listed = [(name, f"{number:020d}") for number, name in enumerate([*NAMES[:4], "y" * 65, "tab\tname"])]
    async with run_app(tmp_path) as house:
        caller = await house.account()
        without_defaults(house.upstream, *listed)
        for voice in ("nobody", "../../v2/voices", "..", "a/../b", "%2e%2e%2f", "a?b=c#d", "\\x", "."):
            told = await house.ask(way, caller.live, {**TASK_BODIES["tts"], "voice": voice})
            assert told.code == "invalid_parameter", voice
            assert "voice" in told.message
            names = told.message.partition(", such as ")[2].partition(", or a voice's id")[0].split(", ")
            assert {"zo\u00eb", "\u674e\u96f7", "john's", "adam"} <= set(names)
            assert house.upstream.requests == []
        for name in names:
            assert (await house.ask(way, caller.live, {**TASK_BODIES["tts"], "voice": name})).code == "ok", (
                name
            )


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_what_is_no_name_is_refused_before_the_list_is_read(tmp_path: Path, way: str) -> None:
    async with run_app(tmp_path) as house:
        caller = await house.account()
        read = []
        house.upstream.aside = lambda received: read.append(received.path)  # type: ignore[func-returns-value]
        for key in (caller.live, caller.test):
            for voice in ("x" * 65, " ", "a\nb", "a\0b", "a\u202eb", "a\u2028b"):
                told = await house.ask(way, key, {**TASK_BODIES["tts"], "voice": voice})
                assert (told.code, "a voice's name" in told.message) == ("invalid_parameter", True), voice
        assert read == []


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_the_id_of_a_voice_that_is_gone_is_refused_with_names_that_work(
    tmp_path: Path, way: str
) -> None:
    async with run_app(tmp_path) as house:
        caller = await house.account()
        without_defaults(house.upstream, ("Adam - My own", MINE), ("Caleb", "D" * 20))
        for body in SPOKEN:
            for voice_id in (DEFAULTS["adam"], "Z" * 20):
                told = await house.ask(way, caller.live, {**body, "voice": voice_id})
                assert told.code == "invalid_parameter"
                assert "Invalid voice: " in told.message
                assert "such as adam, caleb," in told.message
                assert voice_id in house.upstream.requests[-1].path.split("/")
        assert (await house.balance(caller, live=True)).held == 0
        assert await house.records(caller) == []
