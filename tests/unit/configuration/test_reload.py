"""Which changes replace the providers of a running application, and when the former ones are closed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomelo.configuration import read_configuration, reload
from pomelo.configuration.reload import Reloader, _changes, merge
from pomelo.providers import Credentials, Unusable
from pomelo.providers.base import Provider
from pomelo.settings import Settings
from tests.waiting import until

CATALOG = """
[hosts.mine]
base_url = "http://127.0.0.1:{port}/v1"

[models.mine]
type = "text"
limits = {{ max_input_tokens = 1000, max_output_tokens = 1000 }}
price = {{ million_input_tokens = "{price}", million_output_tokens = "1" }}
price_version = "2026-11-26"
routes = [{{ provider = "mine", model = "one" }}]
"""
PLANS = {"new": {"requests_per_minute": 1}}


class Rig:
    """A reloader, the tasks that run, and which of the sets of providers that were opened are closed."""

    def __init__(self, folder: Path, *, is_first: bool = True) -> None:
        self.tasks: set[object] = set()
        self.closed: list[bool] = []
        self.applied = 0
        self.origins: object = None
        """From which the providers that were opened last may download files."""
        self.broken: list[str] = []
        """Plug-ins that can't be used."""
        self.checks = 0
        """How often it was asked which tasks run."""
        self._catalog = folder / "catalog.toml"
        settings = self.settings()
        self.reloader = Reloader(
            settings, read_configuration(settings), self._open, self._running, is_first=is_first
        )
        self.reloader.apply = self._apply

    def settings(self, *, port: int = 1, price: int = 1, **changes: Any) -> Settings:
        """Settings with a catalogue of a host at that port, and of a model at that price."""
        self._catalog.write_text(CATALOG.format(port=port, price=price))
        return Settings(catalog=self._catalog, **changes)

    async def reload(self, **changes: Any) -> None:
        await self.reloader.reload(lambda: self.settings(**changes))

    def _running(self) -> set[object]:
        self.checks += 1
        return self.tasks

    def _apply(self, *configuration: Any) -> None:
        self.applied += 1

    @asynccontextmanager
    async def _open(
        self, entries: Iterable[object], *args: Any, **options: Any
    ) -> AsyncIterator[Mapping[str, Provider]]:
        number = len(self.closed)
        self.closed.append(False)
        self.origins = options["origins"]
        for name in self.broken:
            options["on_broken"](name, f"{name} is broken")
        yield dict.fromkeys(self.broken, Unusable())
        self.closed[number] = True


@pytest.mark.parametrize(
    ("changes", "opened", "logged"),
    [
        ({}, 1, "nothing has changed"),
        ({"price": 2}, 1, "models changed: mine"),
        ({"plans": PLANS}, 1, "plans added: new"),
        ({"port": 2}, 2, "hosts changed: mine"),
        ({"openai_api_key": "another"}, 2, "credentials added: openai"),
        ({"delivery_origins": "http://10.0.0.5:9000"}, 2, "delivery origins changed"),
    ],
    ids=["nothing", "a price", "a plan", "a host", "a key", "an origin"],
)
async def test_providers_are_replaced_if_a_change_concerns_them_and_each_change_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], opened: int, logged: str
) -> None:
    rig = Rig(tmp_path)
    with caplog.at_level(logging.INFO, "pomelo.reload"):
        async with rig.reloader.open():
            await rig.reload(**changes)
            assert (len(rig.closed), rig.applied) == (opened, 1)
            assert rig.origins == rig.reloader.settings.delivery_origins
    assert rig.closed == [True] * opened
    assert caplog.messages == [f"The configuration was reloaded: {logged}"]


def test_a_change_of_the_settings_of_a_plug_in_without_a_key_is_one() -> None:
    old = read_configuration(Settings())
    regions = [replace(old, credentials={"acme": Credentials(None, "", region)}) for region in ("eu", "us")]
    assert list(_changes(*regions)) == ["credentials changed: acme"]


async def test_replaced_providers_are_closed_when_the_tasks_that_may_use_them_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "_CHECK_INTERVAL", 0.001)
    rig = Rig(tmp_path)
    async with rig.reloader.open():
        rig.tasks = {"first", "second"}
        await rig.reload(port=2)
        rig.tasks = {"second", "third"}
        await until(lambda: rig.checks > 3)
        assert rig.closed == [False, False]
        rig.tasks = {"third"}
        await until(lambda: rig.closed == [True, False] and not rig.reloader._closing)
        await rig.reload(port=3)
    assert rig.closed == [True] * 3  # although a task runs


@pytest.mark.parametrize("is_first", [True, False])
async def test_only_the_first_worker_reports_what_was_reloaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_first: bool
) -> None:
    rig = Rig(tmp_path, is_first=is_first)
    with caplog.at_level(logging.INFO, "pomelo.reload"):
        async with rig.reloader.open():
            await rig.reload(price=2, grace=5.0)
            lines = ["The configuration was reloaded: models changed: mine", "Restart to apply POMELO_GRACE"]
            assert caplog.messages == (lines if is_first else [])
            await rig.reload(price=-1)
    assert "was not reloaded" in caplog.messages[-1]


async def test_a_plug_in_that_worked_is_not_replaced_by_a_broken_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "pomelo.reload")
    rig = Rig(tmp_path)
    rig.broken = ["first"]
    async with rig.reloader.open():
        assert [line.partition(": ")[2] for line in caplog.messages] == ["first is broken"]
        caplog.clear()
        await rig.reload(port=2)
        assert (caplog.messages, rig.applied) == ([], 1)
        rig.broken = ["first", "second"]
        await rig.reload(port=3)
        (line,) = caplog.messages
        assert line.endswith("second is broken")
        assert rig.applied == 1
        assert list(rig.reloader.providers) == ["first"]


async def test_a_new_plug_in_that_can_not_be_loaded_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    async with rig.reloader.open():
        metadata = tmp_path / "plug_in-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-in\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text("[pomelo.providers]\nacme = no_such_module:P\n")
        monkeypatch.syspath_prepend(tmp_path)
        await rig.reload()
        (line,) = caplog.messages
        assert "the plug-in acme" in line
        assert "the previous one stays in use" in line
        assert (rig.applied, list(rig.reloader.configuration.registry.broken)) == (0, [])


CERTIFICATE = {"tls_cert": Path("cert.pem"), "tls_key": Path("key.pem")}
CLIENTS = {"tls_client_ca": Path("ca.pem")}


@pytest.mark.parametrize(
    ("running", "new", "fixed"),
    [
        ({}, CERTIFICATE, ["POMELO_TLS_CERT", "POMELO_TLS_KEY"]),
        (CERTIFICATE, {}, ["POMELO_TLS_CERT", "POMELO_TLS_KEY"]),
        (CERTIFICATE, CERTIFICATE | CLIENTS, ["POMELO_TLS_CLIENT_CA"]),
        (CERTIFICATE, {"tls_cert": Path("new.pem"), "tls_key": Path("new key.pem")}, []),
        *[({name: "127.0.0.1:5000"}, {name: "127.0.0.1:0"}, []) for name in ("rest", "grpc", "admin")],
        ({"rest": ""}, {"rest": "127.0.0.1:0"}, ["POMELO_REST"]),
        ({"admin": "127.0.0.1:5000"}, {"admin": "127.0.0.1:5001"}, ["POMELO_ADMIN"]),
    ],
)
def test_a_change_that_needs_a_restart_is_named_and_not_made(
    running: dict[str, Any], new: dict[str, Any], fixed: list[str]
) -> None:
    before, after = Settings().model_copy(update=running), Settings().model_copy(update=new)
    merged, named = merge(before, after)
    assert named == fixed
    expected = before if fixed else after
    assert (merged.tls_cert, merged.tls_key, merged.tls_client_ca) == (
        *(expected.tls_cert, expected.tls_key),
        expected.tls_client_ca,
    )
    assert (merged.rest, merged.grpc, merged.admin) == (before.rest, before.grpc, before.admin)
