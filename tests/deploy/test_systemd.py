"""The units of systemd: systemd accepts them, they are hardened, and Pomelo runs with what they forbid."""

from __future__ import annotations

import asyncio
import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pomelo.settings import Settings
from tests.integration.commands import development_key, environment, free_addresses, pomelo
from tests.waiting import until

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
EACH_UNIT = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
NEEDS_SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")

MAX_EXPOSURE = 2.0
"""Out of 10, by `systemd-analyze security`: below it systemd says OK."""

# prctl(PR_SET_MDWE): no memory may be writable and executable, as with MemoryDenyWriteExecute. Since Linux 6.3.
FORBID_EXECUTABLE_MEMORY = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).prctl(65, 1, 0, 0, 0):
    sys.exit(77)
os.execv(sys.executable, [sys.executable, "-m", "pomelo.cli", "serve"])
"""


def service(unit: Path, section: str = "Service") -> configparser.SectionProxy:
    """Returns a section of a unit; of a setting given twice, the last."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return parser[section]


def test_the_documented_command_has_the_settings_and_the_secrets_of_the_unit() -> None:
    unit = service(FOLDER / "pomelo.service")
    page = (ROOT / "docs" / "deployment.md").read_text()
    (command,) = re.findall(r"^systemd-run (?:.*\\\n)*.*", page, re.MULTILINE)
    options = shlex.split(command)
    assert [f"--setenv={setting}" for setting in unit["Environment"].split()] == [
        option for option in options if option.startswith("--setenv=")
    ]
    assert f"--property=EnvironmentFile={unit['EnvironmentFile']}" in options
    assert f"--uid={unit['User']}" in options
    assert unit["ExecStart"].split()[0] in options


@EACH_UNIT
def test_a_unit_is_started_again_however_long_its_store_is_away(unit: Path) -> None:
    assert service(unit)["Restart"] == "on-failure"
    assert service(unit, "Unit")["StartLimitIntervalSec"] == "0"


@EACH_UNIT
@NEEDS_SYSTEMD
def test_systemd_accepts_a_unit(unit: Path, folder: Path) -> None:
    installed = folder / unit.name
    program = f"{Path(sys.executable).parent}/pomelo"
    installed.write_text(unit.read_text().replace("/opt/pomelo/bin/pomelo", program))
    found = subprocess.run(["systemd-analyze", "verify", installed], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@EACH_UNIT
@NEEDS_SYSTEMD
def test_a_unit_is_hardened(unit: Path) -> None:
    found = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit], capture_output=True, text=True
    )
    exposure = re.search(r"exposure level for [\w.-]+: ([\d.]+)", found.stdout)
    assert exposure is not None, found.stdout + found.stderr
    assert float(exposure[1]) <= MAX_EXPOSURE


def test_both_units_are_hardened_alike() -> None:
    server, gateway = (dict(service(FOLDER / name)) for name in ("pomelo.service", "pomelo-gateway.service"))
    differing = {name for name in server.keys() | gateway.keys() if server.get(name) != gateway.get(name)}
    assert differing == {"ExecStart", "Environment", "EnvironmentFile", "StateDirectory"}


@EACH_UNIT
def test_systemd_waits_longer_than_pomelo_needs_to_drain(unit: Path) -> None:
    assert int(service(unit)["TimeoutStopSec"]) > Settings().grace + 30


async def test_pomelo_serves_without_executable_memory(folder: Path) -> None:
    addresses = free_addresses()
    output = folder / "output"
    with output.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", FORBID_EXECUTABLE_MEMORY),
            stdout=sink,
            stderr=sink,
            env=environment(folder, **addresses),
            cwd=folder,
        )
    try:
        await until(lambda: "Try it:" in output.read_text() or process.returncode is not None, 30)
        if process.returncode == 77:
            pytest.skip("this needs Linux 6.3 or later")
        assert process.returncode is None, output.read_text()
        assert development_key(folder)
        for task in (("Hello",), ("A kite", "-m", "flux-1-pro", "--out", "kite.png")):
            result = await pomelo(folder, "run", *task, **addresses)
            assert (result.status, result.error) == (0, "")
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
