"""The Dockerfile, without building it: `make image-check` does that."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pomelo import __version__
from pomelo.settings import load
from tests.certificates import make_certificate
from tests.deploy.dockerfile import is_sent, read_stages
from tests.integration.commands import environment, free_addresses, start_command

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "docker" / "Dockerfile"
STAGES = {stage.name: stage for stage in read_stages(FILE)}
RUNTIME = STAGES["runtime"]


def test_hadolint_finds_nothing() -> None:
    found = subprocess.run(["hadolint", "--no-color", FILE], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_every_base_is_a_stage_before_or_an_image_of_a_version() -> None:
    known: list[str] = []
    for stage in STAGES.values():
        assert stage.base in known or re.fullmatch(r"docker\.io/library/python:3\.\d+-slim-\w+", stage.base)
        known.append(stage.name)


def test_what_is_copied_exists_and_is_part_of_the_build_context() -> None:
    sources = [
        source
        for stage in STAGES.values()
        for words in map(shlex.split, stage.all("COPY"))
        if not words[0].startswith("--from=")
        for source in words[:-1]
    ]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source, ROOT / ".dockerignore"), source


def test_secrets_and_data_are_no_part_of_the_build_context() -> None:
    for path in (
        ".git/config",
        ".pomelo/secret",
        "deploy/.env",
        "deploy/tls/tls.key",
        "pomelo.toml",
        ".venv/x",
    ):
        assert not is_sent(path, ROOT / ".dockerignore"), path


def test_both_images_run_the_server_as_a_fixed_user_and_check_its_health() -> None:
    assert STAGES["full"].base == STAGES["slim"].base == "runtime"
    assert list(STAGES)[-1] == "full", "the default"
    assert RUNTIME.last("USER") == "10001:10001"
    assert RUNTIME.last("STOPSIGNAL") == "SIGTERM"
    assert json.loads(RUNTIME.last("ENTRYPOINT")) == ["pomelo"]
    assert json.loads(RUNTIME.last("CMD")) == ["serve"]
    (check,) = RUNTIME.all("HEALTHCHECK")
    options, _, command = check.partition(" CMD ")
    (copied,) = RUNTIME.all("COPY")
    assert json.loads(command) == ["python", copied.split()[-1]]
    (timeout,) = re.findall(r"--timeout=(\d+)s", options)
    (own_timeout,) = re.findall(r"^TIMEOUT = (\d+)$", (ROOT / copied.split()[0]).read_text(), re.MULTILINE)
    assert int(timeout) > int(own_timeout)


def test_only_the_user_reads_the_data() -> None:
    assert "--owner pomelo --group pomelo --mode 0700" in " ".join(RUNTIME.last("RUN").split())


def test_what_is_installed_has_the_hashes_of_the_lock() -> None:
    for name in ("build-slim", "build-full"):
        for command in STAGES[name].all("RUN"):
            for each in command.split("&&"):
                if " install " in each and "wheels/" not in each:
                    assert "--require-hashes" in each, each


def test_the_version_of_the_images_is_pomelos() -> None:
    assert RUNTIME.last("ARG") == f"VERSION={__version__}"


def test_the_images_settings_exist_and_need_tls_or_a_decision_of_the_operator() -> None:
    pairs = dict(word.split("=", 1) for word in shlex.split(RUNTIME.last("ENV")))
    settings = load(None, pairs | {"POMELO_INSECURE": "1"})
    ports = {address.rpartition(":")[2] for address in (settings.rest, settings.grpc)}
    assert ports < set(RUNTIME.last("EXPOSE").split())
    assert settings.data == Path(RUNTIME.last("VOLUME"))
    with pytest.raises(Exception, match="POMELO_TLS_CERT"):
        load(None, pairs)


async def check_health(folder: Path, **variables: str) -> int:
    """Returns the status of the images' health check."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, ROOT / "deploy" / "docker" / "healthcheck.py"),
        env=environment(folder, **variables),
    )
    return await process.wait()


@pytest.mark.parametrize("protocols", ["both", "REST with TLS", "gRPC", "IPv6", "one", "all", "all IPv6"])
async def test_the_health_check_succeeds_only_while_the_server_runs(folder: Path, protocols: str) -> None:
    variables = free_addresses()
    if protocols == "REST with TLS":
        make_certificate(folder, "tls", "pomelo.example.com")
        variables |= {"POMELO_TLS_CERT": f"{folder}/tls.pem", "POMELO_TLS_KEY": f"{folder}/tls.key"}
    elif protocols == "gRPC":
        variables["POMELO_REST"] = ""
    elif protocols != "both":
        host = {"IPv6": "[::1]", "one": "127.0.0.2", "all": "0.0.0.0", "all IPv6": "[::]"}[protocols]
        variables = {name: value.replace("127.0.0.1", host) for name, value in variables.items()}
        variables["POMELO_INSECURE"] = "1"
    assert await check_health(folder, **variables) == 1
    async with start_command(folder, "serve", **variables) as server:
        await server.read_until("Your test key")
        assert await check_health(folder, **variables) == 0
    assert await check_health(folder, **variables) == 1
