"""Both images: their instructions run in a bare Debian, and the results serve as containers would. It takes minutes:
`make image-check`."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.deploy.dockerfile import Builder, Image, container_command, container_environment, read_stages
from tests.ports import free_port
from tests.tasks import text_body
from tests.waiting import until

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
DEBIAN = "bookworm"
PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"

pytestmark = [
    pytest.mark.skipif("POMELO_IMAGE_CHECK" not in os.environ, reason="run: make image-check"),
    pytest.mark.timeout(1800),
]


def make_base(name: str, root: Path) -> None:
    """Creates the root of a stand-in for the official image: the same Debian and minor version of Python."""
    assert name == f"docker.io/library/python:3.11-slim-{DEBIAN}"
    finished = root.with_name("base")
    if finished.exists():
        subprocess.run(["cp", "-a", finished, root], check=True)
        return
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, root], check=True)
    for program, link in (("python3", "python"), ("python3", "python3"), ("pip3", "pip")):
        (root / "usr/local/bin" / link).symlink_to(f"/usr/bin/{program}")
    # The official image's Python belongs to no package of Debian.
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    authorities = "etc/ssl/certs/ca-certificates.crt"  # those of this machine, for its package registry
    shutil.copyfile(Path("/", authorities), root / authorities)
    subprocess.run(["cp", "-a", root, finished], check=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Image]]:
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.skip("this needs root and debootstrap")
    work = tmp_path_factory.mktemp("images")
    work.parent.chmod(0o755)  # the user of the image has to reach its root
    work.chmod(0o755)
    proxies = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    builder = Builder(ROOT, work, make_base, proxies)
    for stage in read_stages(ROOT / "deploy/docker/Dockerfile"):
        builder.build(stage)
    yield builder.images
    shutil.rmtree(work)


@dataclass
class Container:
    """A running server, and a command in its container."""

    image: Image
    data: Path
    port: int
    process: asyncio.subprocess.Process
    environment: dict[str, str]
    output: Path

    @property
    def key(self) -> str:
        return (self.data / "test-key").read_text().strip()

    async def run(self, *arguments: str) -> tuple[int, str]:
        """Returns the status and the output of a command."""
        process = await asyncio.create_subprocess_exec(
            *container_command(self.image, list(arguments), {"/var/lib/pomelo": self.data}),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()

    async def post(self, **body: object) -> tuple[int, bytes]:
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.key}"}) as session,
            session.post(f"http://127.0.0.1:{self.port}/api/v1/task", json=body) as answer,
        ):
            return answer.status, await answer.read()


@asynccontextmanager
async def start(image: Image, folder: Path) -> AsyncIterator[Container]:
    """Runs an image's own command on free ports of loopback, with an empty data folder."""
    data = folder / "data"
    data.mkdir(mode=0o700)
    user, group = map(int, image.user.split(":"))
    os.chown(data, user, group)
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    port = free_port()
    environment = container_environment(
        image, POMELO_REST=f"127.0.0.1:{port}", POMELO_GRPC=f"127.0.0.1:{free_port()}"
    )
    output = folder / "output"
    with output.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *container_command(image, image.entrypoint + image.command, {"/var/lib/pomelo": data}),
            env=environment,
            stdout=sink,
            stderr=sink,
        )
    container = Container(image, data, port, process, environment, output)
    try:
        await until(lambda: "Try it:" in output.read_text() or process.returncode is not None, 30)
        assert process.returncode is None, output.read_text()
        yield container
    finally:
        if process.returncode is None:
            process.terminate()
            assert await process.wait() == 0, output.read_text()


@pytest.fixture(params=["full", "slim"])
def image(request: pytest.FixtureRequest, images: dict[str, Image]) -> Image:
    return images[str(request.param)]


async def test_an_image_serves_as_its_user_with_a_read_only_root_and_no_capabilities(
    image: Image, folder: Path
) -> None:
    async with start(image, folder) as container:
        assert (await container.post(**text_body()))[0] == 200
        status, answer = await container.run("pomelo", "run", "Hello", "--model", "gpt-4")
        assert (status, "Hello" in answer) == (0, True), answer
        assert (await container.run("pomelo", "audit"))[0] == 0
        status, answer = await container.run("touch", "/opt/pomelo/file")
        assert "Read-only" in answer or "Permission denied" in answer, (status, answer)
        assert (await container.run("id", "-u"))[1].strip() == "10001"


async def test_the_health_check_succeeds_while_the_server_accepts_requests_and_fails_after_its_end(
    image: Image, folder: Path
) -> None:
    async with start(image, folder) as container:
        assert await container.run(*image.health) == (0, "")
    assert (await container.run(*image.health))[0] == 1


async def test_only_the_full_image_has_the_sandboxs_mp3(images: dict[str, Image], folder: Path) -> None:
    speech = {"model": "eleven-labs-tts", "text": "Hello", "voice": "adam", "output_format": "mp3_44100_128"}
    for name, status in (("full", 200), ("slim", 503)):
        place = folder / name
        place.mkdir()
        async with start(images[name], place) as container:
            assert (await container.post(**speech))[0] == status


async def test_an_image_has_its_services_libraries_and_no_build_tools(image: Image, folder: Path) -> None:
    async with start(image, folder) as container:
        for module in ("asyncpg", "obstore", "opentelemetry.sdk", "redis", "uvloop"):
            assert await container.run("python", "-c", f"import {module}") == (0, "")
        for module in ("hatchling", "pip", "setuptools"):
            assert (await container.run("/opt/pomelo/bin/python", "-c", f"import {module}"))[0] == 1
        for program in ("gcc", "make", "git"):
            assert (await container.run("which", program))[0] == 1
    size = sum(
        file.stat().st_size for file in (image.root / "opt/pomelo").rglob("*") if not file.is_symlink()
    )
    log.info("%s: /opt/pomelo has %.0f MB", image.root.name, size / 1e6)


def test_the_documented_commands_for_systemd_install_pomelo(images: dict[str, Image]) -> None:
    (block,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/deployment.md").read_text(), re.DOTALL)
        if "systemctl daemon-reload" in block
    ]
    root = images["runtime"].root.with_name("base")
    for name in ("deploy", "pomelo", "gateway", "pyproject.toml", "README.md"):
        subprocess.run(["cp", "-a", "--parents", name, root / "srv"], cwd=ROOT, check=True)
    # There is no systemd in a folder.
    script = f'systemctl() {{ echo "systemctl $*"; }}; cd /srv\n{block}'
    done = subprocess.run(["chroot", root, "bash", "-ec", script], check=True, capture_output=True, text=True)
    assert "systemctl enable --now pomelo" in done.stdout
    unit = (root / "etc/systemd/system/pomelo.service").read_text()
    (program,) = re.findall(r"^ExecStart=(\S+) serve$", unit, re.MULTILINE)
    assert subprocess.run(["chroot", root, program, "--version"]).returncode == 0
    assert (root / "etc/pomelo/environment").stat().st_mode & 0o777 == 0o600
    for name in ("pomelo.toml", "environment"):
        assert (root / "etc/pomelo" / name).exists()
