"""Runs the receiver of docs/alerts.md, and the commands that send it alerts."""

from __future__ import annotations

import asyncio
import base64
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from pomelo.alerts.webhooks import WAITS
from tests.integration.commands import create_data, pomelo
from tests.ports import free_port
from tests.web_server import serve_application

PAGE = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
SECRET = "whsec_" + base64.b64encode(b"a secret of the operator for alerts").decode()


@asynccontextmanager
async def receiver(secret: str, port: int) -> AsyncIterator[asyncio.StreamReader]:
    """Runs the receiver of the page; yields what it prints."""
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        env={"ALERT_SECRET": secret, "PORT": str(port)},
        stdout=PIPE,
    )
    try:
        async with asyncio.timeout(30):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    break
        assert process.stdout is not None
        yield process.stdout
    finally:
        process.kill()
        await process.wait()


async def _send(folder: Path, port: int, variables: Mapping[str, str]) -> tuple[int, str]:
    url = f"http://127.0.0.1:{port}/pomelo"
    result = await pomelo(folder, "alerts", "test", POMELO_ALERT_URL=url, **variables)
    assert result.error == ""
    return result.status, result.out


async def test_the_receiver_of_the_page_takes_signed_alerts_alone(tmp_path: Path) -> None:
    await create_data(tmp_path)
    derived = (await pomelo(tmp_path, "alerts", "secret")).out.strip()
    own = (await pomelo(tmp_path, "alerts", "secret", POMELO_ALERT_SECRET=SECRET)).out.strip()
    assert (own, derived[:6]) == (SECRET, "whsec_")
    port = free_port()
    delivered = (0, f"Delivered to http://127.0.0.1:{port}\n")
    async with receiver(derived, port) as output:
        assert await _send(tmp_path, port, {}) == delivered
        async with asyncio.timeout(30):
            assert await output.readline() == b"test {'message': 'Alerts of Pomelo reach you here'}\n"
        refused = (1, f"http://127.0.0.1:{port} answered 401\n")
        assert await _send(tmp_path, port, {"POMELO_ALERT_SECRET": SECRET}) == refused
        # The secret of before is still one of the signatures while it is rotated.
        both = {"POMELO_ALERT_SECRET": f"{SECRET},{derived}"}
        assert await _send(tmp_path, port, both) == delivered


async def test_a_receiver_that_does_not_answer_does_not_delay_the_test_of_the_next(tmp_path: Path) -> None:
    await create_data(tmp_path)
    next_one = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/first":
            await next_one.wait()
        next_one.set()
        return web.Response()

    app = web.Application()
    app.router.add_post("/{path}", answer)
    async with serve_application(app) as url:
        result = await pomelo(tmp_path, "alerts", "test", POMELO_ALERT_URL=f"{url}/first,{url}/next")
    assert (result.status, result.out) == (0, 2 * f"Delivered to {url}\n")


def test_the_page_has_the_number_and_the_time_of_the_attempts() -> None:
    assert f"There are five\nattempts within about {round(sum(WAITS) / 60)} minutes" in PAGE
    assert len(WAITS) + 1 == 5


async def test_without_a_receiver_or_a_secret_the_commands_say_what_to_set(tmp_path: Path) -> None:
    result = await pomelo(tmp_path, "alerts", "test")
    assert (result.status, result.error) == (
        1,
        "pomelo: No receiver of alerts is set. Set POMELO_ALERT_URL\n",
    )
    result = await pomelo(tmp_path, "alerts", "secret")
    assert result.status == 1
    assert "There is no root secret yet" in result.error
