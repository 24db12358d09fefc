"""Runs the scripts in tests/node with Node.js and the packages of their lock file."""

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


def install(cache: Path, folder: Path = FOLDER) -> Path:
    """Installs the packages of the lock file in `folder` below `cache`, unless they are there; returns their
    `node_modules`. Skips the test if Node.js is missing or npm can't install."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not on this machine")
    lock = (folder / "package-lock.json").read_bytes()
    target = cache / hashlib.sha256(lock).hexdigest()[:16]
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        for name in ("package.json", "package-lock.json"):
            shutil.copy(folder / name, temporary)
        try:
            subprocess.run(
                ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"],
                cwd=temporary,
                check=True,
                capture_output=True,
                timeout=240,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            shutil.rmtree(temporary)
            last = ((error.stderr or b"").decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
            pytest.skip(f"npm can't install the packages of {folder.name}: {last}")
        move_once(temporary, target)
    return target / "node_modules"


def move_once(made: Path, target: Path) -> None:
    """Renames a folder to `target`, or deletes it if another test process has made the target meanwhile."""
    try:
        made.rename(target)
    except OSError:
        shutil.rmtree(made)
        assert target.is_dir()


async def run(modules: Path, script: str, argument: Any) -> Any:
    """Runs a script with an argument in JSON; returns the JSON that it prints."""
    return json.loads(await output(modules, script, argument))


async def output(modules: Path, script: str, argument: Any) -> bytes:
    """Runs a script with an argument in JSON; returns what it prints."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(FOLDER / script),
        json.dumps(argument),
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
    return out
