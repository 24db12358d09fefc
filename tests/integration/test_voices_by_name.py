"""`voice: "adam"` on live keys of a vendor account without the default voices, over every protocol."""

from pathlib import Path

import pytest

from pomelo.testing import FaultUpstream, Received, Reply, Speech, VoiceList
from pomelo.testing.elevenlabs_wire import error_reply
from tests.integration.house import KINDS, WAYS, open_house

MINE, TABLE = "AaOhDHYJ1XLZk74lXhdE", "B" * 20
SPOKEN = [KINDS["tts"], KINDS["sts"]]


def without_defaults(upstream: FaultUpstream, *listed: tuple[str, str]) -> None:
    """Makes the vendor list these voices, accept them and `TABLE`, and reject all others."""
    voices = {TABLE, *(voice_id for _, voice_id in listed)}

    def answer(received: Received) -> Reply:
        if any(voice in received.path for voice in voices):
            return Speech()(received)
        return error_reply(404, "voice_not_found", kind="not_found", param="voice_id")

    upstream.default = answer
    upstream.aside = lambda received: VoiceList(listed)(received) if "/voices" in received.path else None


@pytest.mark.parametrize("way", WAYS)
async def test_a_voice_is_found_in_the_operators_table_or_the_accounts_list(tmp_path: Path, way: str) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(f'[voices]\nBella = "{TABLE}"\n')
    async with open_house(tmp_path, settings={"catalog": catalog}) as house:
        caller = await house.caller()
        without_defaults(house.upstream, ("Adam - My own", MINE))
        for body in SPOKEN:
            told = await house.ask(way, caller.live, body)
            assert (told.code, MINE in house.upstream.requests[-1].path) == ("ok", True)
            told = await house.ask(way, caller.live, {**body, "voice": "bella"})
            assert (told.code, TABLE in house.upstream.requests[-1].path) == ("ok", True)


@pytest.mark.parametrize("way", WAYS)
async def test_a_deleted_voice_is_replaced_by_the_next_of_its_name_or_refused(
    tmp_path: Path, way: str
) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text('[voices]\nadam = "CCCCCCCCCCCCCCCCCCCC"\n')
    async with open_house(tmp_path, settings={"catalog": catalog}) as house:
        caller = await house.caller()
        without_defaults(house.upstream, ("Adam - My own", MINE), ("Caleb", "D" * 20))
        told = await house.ask(way, caller.live, KINDS["tts"])
        asked = [request.path.split("/")[-1] for request in house.upstream.requests]
        assert (told.code, asked) == ("ok", ["C" * 20, MINE])
        told = await house.ask(way, caller.live, {**KINDS["tts"], "voice": "alice"})
        assert (told.code, "caleb" in told.message) == ("invalid_parameter", True)
        assert (await house.balance(caller, live=True)).held == 0
        assert len(await house.records(caller)) == 1
