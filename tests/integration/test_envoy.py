"""What Envoy alone does with the configuration of deploy/envoy: it notices by itself that a server drains."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.envoy import PROGRAM, open_envoy, write_configuration
from tests.integration.proxy import Upstream
from tests.integration.rolling import RollingServers
from tests.ports import free_port

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="Envoy is not installed")


def test_envoy_accepts_the_configuration(folder: Path) -> None:
    file = write_configuration(folder, free_port(), Upstream(free_port(), free_port()))
    found = subprocess.run([PROGRAM, "--mode", "validate", "-c", file], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


async def test_servers_restart_one_after_the_other_without_a_failed_call(folder: Path) -> None:
    async with (
        # Envoy needs 4 s to notice that a server drains, more on a busy machine.
        RollingServers(folder, POMELO_DRAIN_DELAY="10") as servers,
        open_envoy(folder, free_port(), *servers.upstreams) as envoy,
    ):

        async def restart(number: int) -> None:
            await servers.restart(number)
            await envoy.all_healthy()

        # Each restart takes more than 10 s, in which calls without a pause would occupy the machine.
        codes = await servers.codes_during_restarts(envoy, restart, pause=0.03)
        assert len(codes) > 50
        assert set(codes) == {"ok"}
        await servers.audit()
