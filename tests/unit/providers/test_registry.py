"""Which providers there are: built-in ones, plug-ins, hosts; and what is refused at start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pomelo.providers import BUILTIN, GROUP, Credentials, open_providers
from pomelo.providers.base import Probe
from pomelo.providers.chat.compatible import Compatible
from pomelo.providers.http.client import Http
from pomelo.providers.registry import read_registry

MODEL = """
[models.{name}]
type = "text"
limits = {{ max_input_tokens = 1000, max_output_tokens = 100 }}
price = {{ million_output_tokens = "1" }}
price_version = "2026-11-22"
[[models.{name}.routes]]
provider = "{provider}"
model = "m"
"""


class Plain:
    """A provider without a base URL and a catalogue."""


class Bringing:
    """A provider with a base URL, and a catalogue that a test writes."""

    base_url = "https://api.acme.example"
    probe = Probe("/ping")
    catalog: Path


def point(name: str, value: str = "Plain") -> EntryPoint:
    """An entry point to something in this file."""
    return EntryPoint(name, f"{__name__}:{value}", GROUP)


def catalogue(folder: Path, text: str) -> Path:
    """A catalogue file."""
    path = folder / "catalog.toml"
    path.write_text(text)
    return path


def test_the_built_in_providers_and_hosts_are_there() -> None:
    registry = read_registry(plugins=[])
    assert set(BUILTIN) < set(registry.entries)
    assert set(registry.catalog.hosts) == {
        "together-chat",
        "openrouter",
        "groq",
        "fireworks",
        "vllm",
        "ollama",
    }
    assert registry.entries.keys() - set(BUILTIN) == set(registry.catalog.hosts)
    assert {name for name, entry in registry.entries.items() if not entry.key_needed} == {"vllm", "ollama"}
    for name in BUILTIN:
        assert registry.entries[name].base_url.startswith("https://")
        assert registry.entries[name].probe is not None


async def test_a_host_is_built_with_its_own_credentials_or_those_of_another_host() -> None:
    entries = read_registry(plugins=[]).entries
    given: Mapping[str, Credentials] = {
        "groq": Credentials("a"),
        "together": Credentials("b", "https://elsewhere.example/v1"),
        "ollama": Credentials(None, "http://127.0.0.1:11434/v1"),
    }
    assert entries["groq"].located(given) == Credentials("a", "https://api.groq.com/openai/v1")
    assert entries["together-chat"].located(given) == Credentials("b", "https://elsewhere.example/v1")
    async with Http() as http:
        made = {name: entry.make(entry.located(given), http) for name, entry in entries.items()}
    assert isinstance(made["groq"], Compatible)
    assert {
        name for name in ("groq", "together-chat", "ollama", "vllm", "openrouter") if made[name].configured
    } == {
        "groq",
        "together-chat",
        "ollama",
    }


def test_a_plug_in_is_found_with_its_base_url_and_its_models(tmp_path: Path) -> None:
    Bringing.catalog = catalogue(tmp_path, MODEL.format(name="acme-1", provider="acme"))
    registry = read_registry(plugins=[point("acme", "Bringing"), point("plain")])
    assert registry.entries["acme"].base_url == "https://api.acme.example"
    assert registry.entries["acme"].probe == Probe("/ping")
    plain: object = registry.entries["plain"].make
    assert plain is Plain
    assert "acme-1" in registry.catalog.models
    assert "gpt-4" in registry.catalog.models


def test_the_operators_catalogue_replaces_the_entries_of_plug_ins(tmp_path: Path) -> None:
    own = catalogue(tmp_path, MODEL.format(name="gpt-4", provider="groq"))
    assert read_registry(own, plugins=[]).catalog.models["gpt-4"].routes[0].provider == "groq"


@pytest.mark.parametrize("name", ["gpt-4", "acme-1"])
def test_a_plug_in_replaces_no_model(tmp_path: Path, name: str) -> None:
    Bringing.catalog = catalogue(tmp_path, MODEL.format(name=name, provider="acme"))
    plugged = [point("acme", "Bringing")] + ([point("again", "Bringing")] if name == "acme-1" else [])
    with pytest.raises(ValueError, match=rf"defines {name}, which exists already"):
        read_registry(plugins=plugged)


def test_a_plug_in_replaces_no_host(tmp_path: Path) -> None:
    Bringing.catalog = catalogue(tmp_path, '[hosts.groq]\nbase_url = "https://api.acme.example"\n')
    with pytest.raises(ValueError, match="defines groq, which exists already"):
        read_registry(plugins=[point("acme", "Bringing")])


@pytest.mark.parametrize("name", ["openai", "sandbox", "twice"])
def test_two_providers_of_one_name_are_refused(name: str) -> None:
    plugged = [point(name)] * (2 if name == "twice" else 1)
    with pytest.raises(ValueError, match=f"the name {name} is used by another provider"):
        read_registry(plugins=plugged)


def test_a_plug_in_that_can_not_be_loaded_is_named() -> None:
    with pytest.raises(ValueError, match=r"^the plug-in acme \(.*:Absent\) can't be loaded: ") as caught:
        read_registry(plugins=[point("acme", "Absent")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MODEL.format(name="x", provider="nobody"),
            "8: models.x.routes[0].provider: no provider is called nobody",
        ),
        (
            MODEL.format(name="x", provider="bfl"),
            "8: models.x.routes[0].provider: bfl has no tasks of type text. It has: image",
        ),
        ("[hosts.openai]\n", "1: hosts.openai: a provider has that name"),
        ("[hosts.sandbox]\n", "1: hosts.sandbox: a provider has that name"),
        ('[hosts.h]\nbanana = "x"\n', "2: hosts.h.banana: is an unknown key"),
        ("[hosts.h]\nbase_url = 1\n", "2: hosts.h.base_url: must be text"),
        ('[hosts.h]\ncredentials = "nobody"\n', "2: hosts.h.credentials: no provider is called nobody"),
    ],
)
def test_a_catalogue_that_does_not_exist_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"catalog.toml:{message}")):
        read_registry(catalogue(tmp_path, text), plugins=[])


class Exiting:
    """A provider that can't be made."""

    def __init__(self, credentials: Credentials, http: Http) -> None:
        raise SystemExit(credentials.api_key)


async def test_a_plug_in_that_can_not_be_opened_is_named_without_its_message(tmp_path: Path) -> None:
    entry = read_registry(plugins=[point("acme", "Exiting")]).entries["acme"]
    with pytest.raises(ValueError, match=r"^the provider acme can't be opened: SystemExit$"):
        async with open_providers([entry], {"acme": Credentials("secret")}):
            pass


async def test_a_plug_in_that_can_not_be_opened_is_not_configured(tmp_path: Path) -> None:
    registry = read_registry(plugins=[point("acme", "Exiting")])
    broken: list[str] = []
    entries = [registry.entries["acme"], registry.entries["openai"]]
    keys = {name: Credentials("secret") for name in ("acme", "openai")}
    async with open_providers(entries, keys, on_broken=lambda name, reason: broken.append(name)) as providers:
        configured = {name: provider.configured for name, provider in providers.items()}
    assert broken == ["acme"]
    assert configured == {"sandbox": True, "acme": False, "openai": True}


def test_a_plug_in_that_exits_when_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exiting_plug_in.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"^the plug-in acme \(exiting_plug_in:A\) can't be loaded: SystemExit"
    ):
        read_registry(plugins=[EntryPoint("acme", "exiting_plug_in:A", GROUP)])
