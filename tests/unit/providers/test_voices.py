"""The cache of the list of voices, and failures to refresh it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from pomelo.errors import PomeloError
from pomelo.providers.base import CALLER
from pomelo.providers.elevenlabs.voices import (
    DEFAULTS,
    LAST_DAY,
    MAX_AGE,
    MAX_NAMES,
    OPENAI_VOICES,
    REFRESH_AFTER,
    Voices,
)
from pomelo.providers.errors import UpstreamError
from tests.unit.refusals import refused

OTTO = "B" * 20


class Account:
    """An account with a list of voices and a clock that tests set."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.voices: list[tuple[str, str]] | UpstreamError = [("Otto", OTTO)]
        self.readings = 0

    async def listed(self) -> list[tuple[str, str]]:
        """The list, or the failure."""
        self.readings += 1
        if isinstance(self.voices, UpstreamError):
            raise self.voices
        return self.voices

    def opened(self) -> Voices:
        """The tested object."""
        return Voices(self.listed, now=lambda: self.time)


async def test_an_expired_list_is_read_again() -> None:
    account = Account()
    voices = account.opened()
    assert await voices.find("otto") == OTTO
    account.time += MAX_AGE - 1
    assert await voices.find("otto") == OTTO
    assert account.readings == 1
    account.voices = [("Otto", "C" * 20)]
    account.time += 1
    assert await voices.find("otto") == "C" * 20
    assert account.readings == 2


async def test_the_list_is_read_without_an_account() -> None:
    callers = []

    async def listed() -> list[tuple[str, str]]:
        callers.append(CALLER.get())
        return [("Otto", OTTO)]

    CALLER.set("acme")
    assert await Voices(listed).find("otto") == OTTO
    assert callers == [""], "else the share of one account would decide for all that wait"
    assert CALLER.get() == "acme"


async def test_a_new_voice_is_found_soon_and_unknown_names_do_not_cause_many_requests() -> None:
    account = Account()
    voices = account.opened()
    for _ in range(5):
        with pytest.raises(PomeloError, match="voice"):
            await voices.find("anna")
    assert account.readings == 1
    account.voices = [("Anna", "D" * 20)]
    account.time += REFRESH_AFTER
    assert await voices.find("anna") == "D" * 20
    assert account.readings == 2


async def test_a_voice_that_was_made_anew_is_found_soon() -> None:
    account = Account()
    voices = account.opened()
    assert await voices.find("otto") == OTTO
    account.voices = [("Otto", "C" * 20)]
    with pytest.raises(PomeloError, match="voice"):
        await voices.find("otto", gone={OTTO})
    assert account.readings == 1
    account.time += REFRESH_AFTER
    assert await voices.find("otto", gone={OTTO}) == "C" * 20
    assert account.readings == 2


async def test_a_voice_of_the_account_is_found_soon_once_the_default_voice_of_its_name_is_gone() -> None:
    account = Account()
    account.voices = []
    voices = Voices(account.listed, now=lambda: account.time, today=lambda: LAST_DAY)
    assert await voices.find("adam") == DEFAULTS["adam"]
    account.voices = [("Adam", OTTO)]
    account.time += REFRESH_AFTER
    assert await voices.find("adam", gone={DEFAULTS["adam"]}) == OTTO
    assert account.readings == 2


async def test_an_old_list_is_used_while_the_new_one_can_not_be_read() -> None:
    account = Account()
    voices = account.opened()
    await voices.find("otto")
    account.time += MAX_AGE
    account.voices = UpstreamError("provider_unavailable", wait=7)
    for _ in range(5):
        assert await voices.find("otto") == OTTO
    assert account.readings == 2, "each call waited for a vendor that is down"
    with pytest.raises(PomeloError) as raised:
        await voices.find("anna")
    assert (raised.value.code, raised.value.retry_after) == ("provider_unavailable", 7)


async def test_a_huge_list_is_truncated() -> None:
    account = Account()
    account.voices = [(f"Nr{number}", f"{number:020d}") for number in range(MAX_NAMES)]
    voices = account.opened()
    assert await voices.find("nr1") == f"{1:020d}"
    with pytest.raises(PomeloError, match="voice"):
        await voices.find(f"nr{MAX_NAMES - 1}")


async def test_a_default_voice_is_the_last_choice_and_ends_with_its_last_day() -> None:
    account = Account()
    account.voices = []
    day = LAST_DAY
    voices = Voices(account.listed, now=lambda: account.time, today=lambda: day)
    assert await voices.find("adam") == DEFAULTS["adam"]
    with pytest.raises(PomeloError, match="voice"):
        await voices.find("adam", gone={DEFAULTS["adam"]})
    day += timedelta(days=1)
    with pytest.raises(PomeloError, match="voice"):
        await voices.find("adam")
    account.time += MAX_AGE
    account.voices = [("Adam", OTTO)]
    assert await voices.find("adam") == OTTO
    assert await voices.find("adam", {"adam": "E" * 20}) == "E" * 20
    assert await voices.find("adam", {"adam": "E" * 20}, gone={"E" * 20}) == OTTO


@pytest.mark.parametrize("name", OPENAI_VOICES)
async def test_a_voice_of_openai_is_the_accounts_own_or_else_a_default_voice(name: str) -> None:
    account = Account()
    voices = Voices(account.listed, now=lambda: account.time, today=lambda: LAST_DAY)
    assert await voices.find(name) == DEFAULTS[OPENAI_VOICES[name]]
    account.time += MAX_AGE
    account.voices = [(name.title(), "C" * 20)]
    assert await voices.find(name) == "C" * 20


async def test_a_default_voice_serves_while_the_list_can_not_be_read() -> None:
    account = Account()
    account.voices = UpstreamError("provider_unavailable")
    voices = Voices(account.listed, now=lambda: account.time, today=lambda: LAST_DAY)
    for _ in range(5):
        assert await voices.find("adam") == DEFAULTS["adam"]
    assert account.readings == 1


async def test_a_deleted_id_is_refused_even_while_the_list_can_not_be_read() -> None:
    account = Account()
    account.voices = UpstreamError("provider_unavailable")
    voices = account.opened()
    assert await voices.find(OTTO) == OTTO
    for _ in range(5):
        with refused("invalid_parameter", "voice"):
            await voices.find(OTTO, gone={OTTO})
    assert account.readings == 1


async def test_a_name_that_looks_like_an_id_is_found() -> None:
    account = Account()
    name = "narratorfemalegerman"
    account.voices = [(name, OTTO)]
    voices = account.opened()
    assert await voices.find(name, {name: "C" * 20}) == "C" * 20
    assert await voices.find(name) == name, "it may be an id"
    assert await voices.find(name, gone={name}) == OTTO
