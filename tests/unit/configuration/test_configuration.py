"""What is made of the settings: plans, catalogue, credentials and media."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize

from pomelo.accounts.plans import BUILTIN, Plan
from pomelo.catalog.catalog import Catalog
from pomelo.configuration import (
    credentials,
    find_catalog,
    find_plans,
    find_providers,
    open_media,
    read_configuration,
    rest_url,
)
from pomelo.errors import PomeloError
from pomelo.media.store import MediaStore
from pomelo.providers.base import Options
from pomelo.settings import Settings, SettingsError, load
from pomelo.settings.types import PlanSettings
from tests.certificates import make_certificate
from tests.unit.media.files import PNG, put
from tests.unit.refusals import refused


def load_text(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "pomelo.toml"
    path.write_text(text)
    return load(path, {})


def test_a_plan_of_a_file_has_only_the_limits_that_it_sets(tmp_path: Path) -> None:
    settings = load_text(
        tmp_path,
        """
        [plans.team]
        requests_per_minute = 600
        concurrent_requests = 40
        tokens_per_minute = 1_000_000
        models = ["gpt-4", "flux-1-pro"]

        [plans.pro]
        requests_per_minute = 5
        """,
    )
    plans = find_plans(settings, Catalog.load())
    assert plans["team"] == Plan("team", 600, 40, 1_000_000, frozenset({"gpt-4", "flux-1-pro"}))
    assert plans["pro"] == Plan("pro", requests=5)
    assert plans["free"] == BUILTIN["free"]
    assert plans.keys() == BUILTIN.keys() | {"team"}


def test_a_plan_with_an_unknown_model_is_refused(tmp_path: Path) -> None:
    catalog = Catalog.load()
    (alias, *_) = catalog.models["gpt-4"].aliases  # a plan allows models by their names
    for unknown in ("gpt-5", alias):
        settings = load_text(tmp_path, f"[plans.team]\nmodels = ['gpt-4', '{unknown}']")
        with pytest.raises(SettingsError, match=rf"plans\.team\.models: there is no model {unknown}$"):
            find_plans(settings, catalog)


def test_the_url_of_a_server_has_its_scheme_and_address(tmp_path: Path) -> None:
    assert rest_url(Settings(), ("127.0.0.1", 80)) == "http://127.0.0.1:80"
    make_certificate(tmp_path, "c", "localhost")
    secure = Settings(tls_cert=tmp_path / "c.pem", tls_key=tmp_path / "c.key")
    assert rest_url(secure, ("::1", 443)) == "https://[::1]:443"


def test_the_operators_catalogue_is_read_beside_the_built_in_one(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('[voices]\nadam = "another-voice"\n')
    assert find_catalog(Settings()).models.keys() == Catalog.load().models.keys()
    found = find_catalog(Settings(catalog=path))
    assert (found.models.keys(), found == Catalog.load()) == (Catalog.load().models.keys(), False)
    settings = Settings(catalog=path)
    path.write_text("[models")
    for read in (find_catalog, find_providers):
        with pytest.raises(SettingsError, match=r"own\.toml"):
            read(settings)
    path.unlink()
    for read in (find_catalog, find_providers):
        with pytest.raises(
            SettingsError, match=r"own\.toml: can't be read: No such file.* Set POMELO_CATALOG"
        ):
            read(settings)


def test_two_hosts_whose_variables_are_the_same_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    hosts = (
        '[hosts.a-b]\nbase_url = "https://one.example/v1"\n[hosts.a_b]\nbase_url = "https://two.example/v1"\n'
    )
    path.write_text(hosts)
    with pytest.raises(
        SettingsError, match=r"^A_B_API_KEY would be the key of both a-b and a_b\. Rename one"
    ):
        find_providers(Settings(catalog=path))
    path.write_text(f'{hosts}credentials = "a-b"\n')
    assert find_providers(Settings(catalog=path)).entries["a_b"].account == "a-b"


def settings_of(**providers: Any) -> Settings:
    """Settings of providers."""
    return Settings(**providers)


@pytest.mark.parametrize("key", ["sk-ä", "sk-\x1f-", "sk-\x7f"])
def test_a_key_that_can_not_be_in_a_header_is_refused(key: str) -> None:
    settings = settings_of(openai_api_key=key)
    with pytest.raises(SettingsError, match=r"^OPENAI_API_KEY has characters that no key has$"):
        credentials(settings, find_providers(settings))


def test_credentials_are_those_of_the_settings() -> None:
    settings = settings_of(openai_api_key="sk-1", openai_base_url="https://proxy.example/v1")
    found = credentials(settings, find_providers(settings))
    assert (found["openai"].api_key, found["openai"].base_url) == ("sk-1", "https://proxy.example/v1")
    assert (found["mistral"].api_key, found["mistral"].base_url) == (None, "")


def test_the_further_settings_of_a_provider_are_those_that_it_declares() -> None:
    class Region(Options):
        region: str = "eu"

    settings = Settings.model_validate({"providers": {"openai": {"region": "us"}}})
    registry = find_providers(settings)
    entries = {"openai": replace(registry.entries["openai"], settings=Region)}
    registry = replace(registry, entries=entries)
    assert credentials(settings, registry)["openai"].settings == Region(region="us")
    broken = replace(registry, broken={"openai": "it can't be loaded"})
    assert credentials(settings, broken)["openai"].settings is None


def test_a_catalogue_replaces_that_of_the_settings() -> None:
    builtin = Catalog.load()
    catalog = Catalog([builtin.models["gpt-4"]])
    plan = PlanSettings(models=("flux-1-pro",))
    assert read_configuration(Settings(), catalog).registry.catalog is catalog
    with pytest.raises(SettingsError, match="there is no model flux-1-pro"):
        read_configuration(Settings(plans={"team": plan}), catalog)


async def test_media_have_the_limits_the_url_and_the_secrets_of_the_settings(tmp_path: Path) -> None:
    settings = Settings(
        data=tmp_path,
        public_url="https://api.example",
        media_limit=ByteSize(100_000),
        media_account_limit=ByteSize(50_000),
        disk_reserve=ByteSize(0),
    )
    async with open_media(settings, b"o" * 32, (), lambda: 1_900_000_000.0) as old:
        assert (old.folder, old.public_url, old.now()) == (
            tmp_path / "media",
            "https://api.example",
            1_900_000_000,
        )
        media_id = put(old)
        with refused("payload_too_large"):
            put(old, data=bytes(50_000))
        for owner in "bcd":
            with suppress(PomeloError):
                put(old, owner, bytes(45_000))
        assert old.quota.total == 2 * 45_056 + 4_096
    async with open_media(settings, b"n" * 32, (b"o" * 32,), lambda: 1_900_000_000.0) as new:
        assert new.find(media_id, "ann")[1].size_bytes == len(PNG)
        assert new.quota.total == 2 * 45_056 + 4_096  # counted at the start


async def test_a_bucket_that_can_not_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data=tmp_path, media="s3://bucket/prefix")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(SettingsError, match=r"^POMELO_MEDIA: s3://bucket/prefix can't be used: "):
        async with open_media(settings, b"s" * 32, (), lambda: 0.0):
            pytest.fail("it was opened")


async def test_media_are_closed_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[MediaStore] = []

    async def aclose(media: MediaStore) -> None:
        closed.append(media)

    async def fail() -> None:
        async with open_media(Settings(data=tmp_path), b"s" * 32, (), lambda: 0.0):
            assert closed == []
            raise ZeroDivisionError

    monkeypatch.setattr(MediaStore, "aclose", aclose)
    with pytest.raises(ZeroDivisionError):
        await fail()
    assert len(closed) == 1
