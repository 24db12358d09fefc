"""What `pomelo doctor` says about a provider that the command and the running server see differently."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.cli.doctor import _as_served, _provider
from pomelo.cli.findings import Finding
from pomelo.configuration import credentials, find_providers
from pomelo.settings import Settings
from tests.ports import free_port
from tests.unit.catalog.entries import entry


@pytest.mark.parametrize(
    ("state", "has_it", "expected", "words"),
    [
        ("off", True, "ok", "configured in the running server"),
        ("off", False, "off", "as it was"),
        ("ok", True, "ok", "as it was"),
        ("ok", False, "warning", "as it was, but the running server was started without it: restart it"),
        ("broken", False, "broken", "as it was"),
        ("broken", True, "broken", "as it was"),
    ],
)
def test_a_provider_is_reported_with_what_the_server_has(
    state: str, has_it: bool, expected: str, words: str
) -> None:
    found = _as_served(Finding("openai", state, "as it was"), has_it)
    assert (found.name, found.state) == ("openai", expected)
    assert found.detail.startswith(words)


def test_a_host_that_needs_no_key_is_asked_without_one(tmp_path: Path) -> None:
    base_url = f"http://127.0.0.1:{free_port()}/v1"
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(
        f'[hosts.open]\nbase_url = "{base_url}"\nkey_needed = false\n'
        f'[hosts.closed]\nbase_url = "{base_url}"\n'
        + entry("mine", "text").replace('"p"', '"open"')
        + entry("yours", "text").replace('"p"', '"closed"')
    )
    settings = Settings(catalog=catalog)
    registry = find_providers(settings)
    configured = credentials(settings, registry)
    found = {name: _provider(registry.entries[name], configured) for name in ("open", "closed")}
    assert found["open"] == Finding("open", "broken", f"{base_url} can't be reached")
    assert (found["closed"].state, found["closed"].detail[:23]) == ("off", "CLOSED_API_KEY is not s")
