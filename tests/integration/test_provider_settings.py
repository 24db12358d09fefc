"""Further settings of a provider: the table [providers.NAME] of the file, checked by the class that it declares."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest

from pomelo.configuration import credentials
from pomelo.providers import GROUP, Credentials, open_providers
from pomelo.providers.base import Options
from pomelo.providers.http.client import Http
from pomelo.providers.registry import Registry, read_registry
from pomelo.settings import SettingsError, load


class AcmeSettings(Options):
    region: Literal["us", "eu"] = "us"
    retries: int = 2


class Acme:
    """A provider with settings."""

    base_url = "https://api.acme.example"
    settings = AcmeSettings
    configured = True

    def __init__(self, credentials: Credentials, http: Http) -> None:
        self.given = credentials

    async def aclose(self) -> None:
        pass


class Demanding(Acme):
    """A provider with a setting that has no default."""

    class Settings(Options):
        region: str

    settings: Any = Settings


def registry(name: str = "Acme", *, tolerant: bool = False) -> Registry:
    return read_registry(plugins=[EntryPoint("acme", f"{__name__}:{name}", GROUP)], tolerant=tolerant)


def given(folder: Path, text: str, registry: Registry) -> Credentials:
    """What the provider gets if the file has this text."""
    (folder / "pomelo.toml").write_text(text)
    return credentials(load(folder / "pomelo.toml", {}), registry)["acme"]


async def test_a_provider_gets_its_settings_with_its_key(folder: Path) -> None:
    text = 'acme_api_key = "k"\n[providers.acme]\nregion = "eu"\n'
    found = given(folder, text, registry())
    assert found == Credentials("k", "", AcmeSettings(region="eu", retries=2))
    async with open_providers([registry().entries["acme"]], {"acme": found}) as providers:
        made: Any = providers["acme"]
        assert made.given == Credentials("k", "https://api.acme.example", AcmeSettings(region="eu"))


def test_the_table_may_have_the_key_and_the_base_url_and_be_absent(folder: Path) -> None:
    text = '[providers.acme]\napi_key = "k"\nbase_url = "https://elsewhere.example"\n'
    assert given(folder, text, registry()) == Credentials("k", "https://elsewhere.example", AcmeSettings())
    assert given(folder, "", registry()) == Credentials(None, "", AcmeSettings())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[providers.acme]\nregoin = "eu"\n', "providers.acme.regoin: there is no such key"),
        ('[providers.acme]\nregion = "mars-secret"\n', "providers.acme.region: must be 'us' or 'eu'"),
        ('[providers.acme]\nretries = "5"\n', "providers.acme.retries: must be a valid integer"),
        ('[providers.openai]\nregion = "eu"\n', "providers.openai.region: there is no such key"),
        ("[providers.acme]\nbase_url = 5\n", "acme_base_url: must be a valid string"),
        ("providers = 5\n", "must be a valid dictionary"),
        ('acme_api_key = "k"\n[providers]\nacme = 5\n', "acme"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name_without_its_value(
    folder: Path, text: str, message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        given(folder, text, registry())
    assert message in str(caught.value)
    assert "mars" not in str(caught.value)


def test_a_setting_without_a_default_is_an_error_of_the_plug_in() -> None:
    with pytest.raises(ValueError, match="the provider acme: each of its settings must have a default"):
        registry("Demanding")
    assert set(registry("Demanding", tolerant=True).broken) == {"acme"}


def test_settings_of_a_plug_in_that_can_not_be_loaded_are_not_checked(folder: Path) -> None:
    found = given(folder, '[providers.acme]\nregion = "eu"\n', registry("Absent", tolerant=True))
    assert found.settings is None
