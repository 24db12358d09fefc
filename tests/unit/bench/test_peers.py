"""Other gateways are started where they are installed, and left out with a line where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import peers
from bench.__main__ import installed_peers
from bench.systems import AIOHTTP, LINES, SQLITE


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is searched for commands."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LITELLM", raising=False)
    monkeypatch.delenv("PORTKEY", raising=False)
    return tmp_path


def install(file: Path) -> None:
    """Puts a command or script in place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)


def test_what_is_not_installed_is_left_out_and_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenarios = installed_peers()
    assert [scenario.systems for scenario in scenarios] == [(AIOHTTP, SQLITE), (LINES, SQLITE)]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == list(peers.NAMES)


def test_litellm_is_found_on_the_path_and_portkey_by_its_script(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(path / "litellm")
    script = path / "modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    install(script)
    monkeypatch.setenv("PORTKEY", str(path / "modules"))
    assert list(peers.find()) == [peers.LITELLM]  # without node
    install(path / "node")
    assert peers.find() == {
        peers.LITELLM: [str(path / "litellm")],
        peers.PORTKEY: [str(path / "node"), str(script)],
    }
    assert installed_peers()[0].systems == (AIOHTTP, SQLITE, *peers.NAMES)
    assert capsys.readouterr().err == ""


def test_litellm_is_configured_for_the_vendor(tmp_path: Path) -> None:
    command = peers.command(peers.LITELLM, ["litellm"], "http://127.0.0.1:9", 80, tmp_path)
    configuration = Path(command[command.index("--config") + 1]).read_text()
    assert 'api_base: "http://127.0.0.1:9/v1"' in configuration
    assert f"{{master_key: {peers.KEY}}}" in configuration
