"""Clients that generators make from /openapi.json compile, and send every type of task to a real server."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.openapi.examples import IMAGE
from tests import node_client
from tests.serving import Served, serve
from tests.wav import PCM, wav_file

FOLDER = Path(__file__).parent
PAGE = (FOLDER.parents[1] / "docs" / "generated-clients.md").read_text()
MODELS = ["eleven-labs-stt", "eleven-labs-sts", "eleven-labs-tts", "flux-1-pro", "gpt-4-turbo"]
"""The models of the tasks that both scripts run; those of some they run more than once."""

SOUND = wav_file(PCM, 8000, 2, bytes(3200))


@pytest.fixture
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A server that has run no task."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        yield process


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Runs a command; returns what it prints on stdout, and on stderr."""
    environment = {**os.environ, **variables}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=270)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout + result.stderr


def install_python_generator(cache: Path) -> Path:
    """Installs openapi-python-client below `cache`, unless it is there; skips the test if pip can't. It needs an
    older typer than Pomelo, so it has a folder of its own."""
    requirements = FOLDER / "requirements.txt"
    target = cache / hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]
    if not target.exists():
        temporary = Path(tempfile.mkdtemp(dir=cache))
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        command = (*pip, "--require-hashes", "--requirement", requirements, "--target", temporary)
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            shutil.rmtree(temporary)
            pytest.skip(
                f"pip can't install openapi-python-client: {str(error.stderr or error).strip()[-200:]}"
            )
        node_client.move_once(temporary, target)
    return target


def example(language: str, served: Served) -> str:
    """The first block of a language on the documentation's page, for the server."""
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1].replace("https://your-domain.com", served.url).replace("YOUR_API_KEY", served.key)


def command(program: str, served: Served) -> list[str]:
    """The arguments of the program in the page's command."""
    (line,) = re.findall(rf"^(?:npx )?{program} (.*)$", PAGE, re.MULTILINE)
    return shlex.split(line.replace("https://your-domain.com", served.url))


def arguments(served: Served) -> str:
    return json.dumps([served.url, served.key, IMAGE, base64.b64encode(SOUND).decode()])


def test_a_client_of_openapi_python_client_sends_every_task(
    served: Served, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    generator = install_python_generator(Path(request.config.cache.mkdir("openapi-python-client")))
    (tmp_path / "client.yaml").write_text(example("yaml", served))
    generate = (sys.executable, "-m", "openapi_python_client", *command("openapi-python-client", served))
    printed = run(*generate, cwd=tmp_path, PYTHONPATH=str(generator))
    assert "arning" not in printed
    script = shutil.copy(FOLDER / "every_task.py", tmp_path)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent")
    run(*mypy, script, cwd=tmp_path)
    (tmp_path / "sound.wav").write_bytes(SOUND)
    printed = run(sys.executable, script, arguments(served), "sound.wav", cwd=tmp_path)
    assert set(json.loads(printed)) == set(MODELS)
    (tmp_path / "example.py").write_text(example("python", served))
    run(*mypy, "example.py", cwd=tmp_path)
    assert "sandbox" in run(sys.executable, "example.py", cwd=tmp_path)


def test_a_client_with_the_types_of_openapi_typescript_sends_every_task(
    served: Served, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    modules = node_client.install(Path(request.config.cache.mkdir("node")), FOLDER)
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(FOLDER / "every_task.ts", tmp_path)
    (tmp_path / "example.ts").write_text(example("typescript", served))
    node = tmp_path / "node_modules" / ".bin"
    run(node / "openapi-typescript", *command("openapi-typescript", served), cwd=tmp_path)
    run(
        *(node / "tsc", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"),
        *("--lib", "es2023,dom,dom.iterable", "every_task.ts", "example.ts"),
        cwd=tmp_path,
    )
    printed = run("node", "every_task.js", arguments(served), cwd=tmp_path)
    assert set(json.loads(printed)) == set(MODELS)
    assert "sandbox" in run("node", "example.js", cwd=tmp_path)
