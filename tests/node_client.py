"""Runs scripts of tests/node with Node and the packages that its lock file pins."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "node"


def installed(cache: Path) -> Path:
    """The `node_modules` of the lock file, installed below `cache` the first time. Without Node, or where npm
    can't install, the test is skipped."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not on this machine")
    lock = (FOLDER / "package-lock.json").read_bytes()
    place = cache / hashlib.sha256(lock).hexdigest()[:16]
    if not place.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache))
        for name in ("package.json", "package-lock.json"):
            shutil.copy(FOLDER / name, made)
        try:
            subprocess.run(
                ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"],
                cwd=made,
                check=True,
                capture_output=True,
                timeout=90,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            shutil.rmtree(made)
            last = ((error.stderr or b"").decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
            pytest.skip(f"npm can't install the packages of Node's client: {last}")
        if place.exists():  # another test run was faster
            shutil.rmtree(made)
        else:
            made.rename(place)
    return place / "node_modules"


async def run(modules: Path, script: str, given: Any) -> Any:
    """What a script prints as JSON; `given` is its argument."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(FOLDER / script),
        json.dumps(given),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NODE_PATH": str(modules)},
    )
    try:
        async with asyncio.timeout(60):
            out, error = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, error.decode()
    return json.loads(out)
