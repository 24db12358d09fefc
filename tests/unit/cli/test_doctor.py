"""What `pomelo doctor` says about a server, and about a provider that the server sees differently."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from pomelo.cli.doctor import (
    _as_served,
    _certificate,
    _links,
    _provider,
    _providers,
    check_data,
    describe_certificate,
)
from pomelo.cli.findings import Finding
from pomelo.cli.server_checks import check_grpc, check_rest
from pomelo.configuration import credentials, find_providers
from pomelo.settings import Settings
from tests.certificates import make_certificate
from tests.ports import free_port
from tests.unit.catalog.entries import entry
from tests.web_server import serve_application


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
        f'[hosts.twin]\nbase_url = "{base_url}"\ncredentials = "closed"\n'
        + entry("mine", "text").replace('"p"', '"open"')
        + entry("yours", "text").replace('"p"', '"closed"')
    )
    settings = Settings(catalog=catalog)
    registry = find_providers(settings)
    configured = credentials(settings, registry)
    found = {name: _provider(registry.entries[name], configured) for name in ("open", "closed")}
    assert found["open"] == Finding("open", "broken", f"{base_url} can't be reached")
    assert (found["closed"].state, found["closed"].detail[:23]) == ("off", "CLOSED_API_KEY is not s")
    names = [finding.name for finding in _providers(settings, registry, None)]
    assert ("closed" in names, "twin" in names) == (True, False), "one key is reported once"


async def test_the_base_url_of_a_provider_is_asked_as_the_server_asks_it(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/é/v1/models", answer)
    async with serve_application(app) as url:
        for base_url, words in ((f"{url}/é/v1", "takes the key"), ("http://a..b/v1", "can't be reached")):
            settings = Settings(variables={"OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": base_url})
            registry = find_providers(settings)
            configured = credentials(settings, registry)
            found = await asyncio.to_thread(_provider, registry.entries["openai"], configured)
            assert found.detail == f"{base_url} {words}"


def test_links_that_only_this_machine_can_reach_are_reported() -> None:
    for rest in ("0.0.0.0:8080", "[::]:8080"):
        (found,) = _links(Settings(rest=rest, insecure=True))
        assert (found.state, found.detail.partition(", ")[0]) == (
            "warning",
            f"links to media begin with http://{rest}",
        )
        assert not [*_links(Settings(rest=rest, insecure=True, public_url="https://pomelo.example"))]
    for rest in ("", "127.0.0.1:8080", "pomelo.example:8080"):
        assert not [*_links(Settings(rest=rest, insecure=True))]


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        (200, "ok", "serves"),
        (503, "broken", "takes no requests: it is not ready, or shutting down"),
        (302, "broken", "another program answers"),
        (404, "broken", "another program answers"),
    ],
)
async def test_a_gateway_is_reported_by_the_status_of_its_health_check(
    status: int, state: str, words: str
) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "/other"} if status == 302 else None)

    app = web.Application()
    app.router.add_get("/healthz", answer)
    async with serve_application(app) as url:
        settings = Settings(rest=url.removeprefix("http://"))
        found = await asyncio.to_thread(check_rest, settings, served=True)
    assert (found.name, found.state) == ("REST", state)
    assert words in found.detail


@pytest.mark.parametrize(("name", "check"), [("REST", check_rest), ("gRPC", check_grpc)])
def test_an_address_without_a_server_is_broken_only_if_the_server_runs(
    name: str, check: Callable[[Settings, bool], Finding]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    settings = Settings(rest=address, grpc=address)
    assert [check(settings, served).state for served in (True, False)] == ["broken", "off"]
    off = check(Settings(rest="", grpc=""), True)
    assert off == Finding(name, "off", f"POMELO_{name.upper()} is empty")
    any_port = check(Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0"), True)
    assert (any_port.state, any_port.detail.partition(",")[0]) == ("off", f"POMELO_{name.upper()} has port 0")


@pytest.mark.parametrize(("days", "state"), [("13", "warning"), ("20", "ok")])
def test_a_certificate_is_reported_before_it_ends(tmp_path: Path, days: str, state: str) -> None:
    make_certificate(tmp_path, "a", "a", "-days", days)
    settings = Settings(tls_cert=tmp_path / "a.pem", tls_key=tmp_path / "a.key")
    (found,) = _certificate(settings)
    assert (found.name, found.state) == ("TLS", state)
    assert "a.pem is valid until 20" in found.detail
    ended = describe_certificate(tmp_path / "a.pem", 86_400.0)
    assert ended == Finding("TLS", "broken", f"{tmp_path / 'a.pem'} ended on 1970-01-02")
    (tmp_path / "a.pem").unlink()
    (missing,) = _certificate(settings)
    reason = f"POMELO_TLS_CERT: {tmp_path / 'a.pem'}: No such file or directory"
    assert missing == Finding("TLS", "broken", reason)
    assert list(_certificate(Settings())) == []


def test_a_full_disk_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose disk is full can still be asked for its keys and accounts."""
    settings = Settings(data=tmp_path / "data")
    settings.data.mkdir(mode=0o700)
    disk = list(os.statvfs(tmp_path))
    assert check_data(settings).state == "ok"
    disk[4] = 0  # the free blocks
    monkeypatch.setattr(os, "statvfs", lambda folder: os.statvfs_result(disk))
    found = check_data(settings)
    assert found == Finding("data", "broken", f"no space is left on the disk of {settings.data}. Free some")


def test_a_full_disk_of_the_archive_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, archive = os.statvfs(tmp_path), tmp_path / "archive"
    full = os.statvfs_result([*disk[:4], 0, *disk[5:]])
    monkeypatch.setattr(os, "statvfs", lambda folder: full if folder == archive else disk)
    settings = Settings(
        data=tmp_path / "data", store="redis://127.0.0.1", archive=f"sqlite:{archive / 'usage.db'}"
    )
    settings.data.mkdir(mode=0o700)
    archive.mkdir()
    found = check_data(settings)
    assert found == Finding("data", "broken", f"no space is left on the disk of {archive}. Free some")
