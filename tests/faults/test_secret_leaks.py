"""No vendor's key, prompt or body is in any log line, error, header or file, whatever fails.

Every vendor's key contains a marker, and so does everything that callers send and vendors answer; the vendors
echo it in every kind of failure. The server logs as much as possible: the root logger at DEBUG, asyncio's
debug mode, all warnings. The tests search stdout and stderr, the status, headers, metadata and body of every
error, and the data folder with its database.

Markers are expected in delivered answers, and in the media folder, which holds audio that callers uploaded
and tasks generated. The error for an unknown field or model repeats its name to the caller.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import open_app
from pomelo.gen.v1.text_pb2 import TextInput
from pomelo.providers.base import Event, Job, Provider
from pomelo.secrets import DATABASE
from pomelo.settings import Settings
from pomelo.testing import FaultUpstream
from tests.app import endow
from tests.faults.leak_driver import HALVES, MODES, Driver
from tests.faults.leak_markers import (
    FAULTS,
    LABEL_MARKER,
    MARKER,
    MARKERS,
    NAME_MARKER,
    base_urls,
    count_markers,
    keys,
)
from tests.integration.commands import live_key
from tests.ports import free_port
from tests.scrapes import scrape
from tests.serving import serve

FULL = os.environ.get("CRASH") == "full"
"""Whether every fault occurs in every mode, not in half of them."""

VERBOSE = "import logging\nlogging.basicConfig(level=logging.DEBUG)\n"
"""A sitecustomize.py that sets the root logger to DEBUG before any other import."""


@pytest.fixture
async def own_upstream() -> AsyncIterator[FaultUpstream]:
    """A fault upstream of this test's own."""
    async with FaultUpstream() as server:
        yield server


def assert_no_leaks(driver: Driver) -> None:
    """Checks that no error has a marker, and that the delivered answers do."""
    assert driver.failure_count > 100
    leaks = [error for error in driver.errors if count_markers(error)]
    assert not leaks, leaks[:3]
    assert count_markers(b"".join(driver.delivered)) > 10


@pytest.mark.timeout(300)
async def test_the_log_files_and_errors_of_a_server_leak_nothing(
    tmp_path: Path, own_upstream: FaultUpstream
) -> None:
    (tmp_path / "verbose").mkdir()
    (tmp_path / "verbose" / "sitecustomize.py").write_text(VERBOSE)
    variables = keys() | base_urls(own_upstream)
    admin = f"127.0.0.1:{free_port()}"
    variables |= {
        "POMELO_ADMIN": admin,
        "PYTHONPATH": str(tmp_path / "verbose"),
        "PYTHONWARNINGS": "default",
        "PYTHONASYNCIODEBUG": "1",
        "POMELO_LOG_LEVEL": "debug",
    }
    async with serve(tmp_path, **variables) as served, aiohttp.ClientSession() as session:
        key = await live_key(tmp_path)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
            driver = Driver(served.url, channel, session, key, own_upstream)
            for mode in MODES:
                await driver.run_good(mode)
            for number, fault in enumerate(FAULTS.values()):
                await driver.run_fault(fault, MODES if FULL else HALVES[number % 2])
            await driver.cancel_calls()
            await driver.send_invalid()
            await driver.send_malformed(served.host, served.port)
            await driver.run_good("whole")
        metrics = (await scrape(session, admin)).text.encode()
    assert_no_leaks(driver)
    assert b'code="ok"' in metrics
    assert not count_markers(metrics, *MARKERS)
    assert key.split("_")[-1].encode() not in metrics

    log, secret = served.output.read_bytes(), key.split("_")[-1].encode()
    lines = log.splitlines()
    leaks = [line for line in lines if count_markers(line, *MARKERS) or secret in line]
    assert not leaks, leaks[:5]
    assert b'"level":"debug"' in log
    assert len(lines) > 20

    media_markers = labels = 0
    files = [path for path in served.data.rglob("*") if path.is_file()]
    for path in files:
        assert not count_markers(path.name, *MARKERS)
        data = path.read_bytes()
        if path.parent == served.data / "media":
            media_markers += count_markers(data)
            continue
        found = count_markers(data, LABEL_MARKER)
        assert not found or path.name.startswith(DATABASE), path.name
        labels += found
        assert not count_markers(data, MARKER, NAME_MARKER), path.name
        assert secret not in data, path.name
    assert media_markers, "the media folder has the audio itself"
    assert labels, "the usage records have the labels"
    logging.getLogger(__name__).info(
        "%d calls, %d failures, %d log lines, %d files",
        driver.call_count, driver.failure_count, len(lines), len(files),
    )  # fmt: skip


@asynccontextmanager
async def open_app_driver(
    folder: Path, upstream: FaultUpstream, providers: Mapping[str, Provider] | None = None, **vendors: Any
) -> AsyncIterator[tuple[Driver, tuple[str, int]]]:
    """A driver of an app in this process, and REST's address."""
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=folder / "data", **vendors)
    async with open_app(settings, providers=providers) as app, aiohttp.ClientSession() as session:
        assert app.rest is not None
        assert app.grpc is not None
        await endow(app.store)
        _, key = await app.keyring.create(live=True)
        async with grpc.aio.insecure_channel(app.grpc) as channel:
            yield Driver("http://{}:{}".format(*app.rest), channel, session, key, upstream), app.rest


@pytest.mark.timeout(300)
async def test_no_logger_leaks(
    tmp_path: Path, own_upstream: FaultUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    vendors: dict[str, Any] = {
        name.lower(): value for name, value in (keys() | base_urls(own_upstream)).items()
    }
    async with open_app_driver(tmp_path, own_upstream, **vendors) as (driver, address):
        loop = asyncio.get_running_loop()
        loop.set_debug(True)
        try:
            await driver.run_good("stream")
            for name in ("400", "500", "HTML", "cut within an event", "not HTTP", "a bad chunk", "closed"):
                await driver.run_fault(FAULTS[name])
            await driver.cancel_calls()
            await driver.send_malformed(*address)
        finally:
            loop.set_debug(False)
    assert_no_leaks(driver)
    logging.getLogger("tests").debug("a line of the test")
    assert "a line of the test" in caplog.text, "loggers are captured"
    leaks = [line for line in caplog.text.splitlines() if count_markers(line)]
    assert not leaks, leaks[:5]
    assert not count_markers(caplog.text)


class LeakyProvider:
    """A provider plug-in whose exceptions contain its input and the vendor's answer."""

    configured = True

    async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        try:
            raise KeyError(f"{MARKER}-answer")
        except KeyError as error:
            error.add_note(f"{MARKER}-note")
            raise ExceptionGroup(f"{MARKER}-group", [ValueError(repr(job.input))]) from error
        yield Event()

    async def aclose(self) -> None:
        pass


async def test_an_unexpected_exception_is_logged_without_its_message(
    tmp_path: Path, own_upstream: FaultUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    providers = {"openai": LeakyProvider()}
    async with open_app_driver(tmp_path, own_upstream, providers) as (driver, _):
        for mode in ("whole", "stream"):
            await driver.rest("gpt-4", mode, 10.0)
            await driver.grpc("gpt-4", mode, 10.0)
    assert driver.failure_count == driver.call_count == 4
    assert not [error for error in driver.errors if count_markers(error)]
    assert caplog.text.count("failed unexpectedly") == 4
    assert caplog.text.count("builtins.ExceptionGroup") == 4
    assert caplog.text.count("builtins.KeyError") == caplog.text.count("builtins.ValueError") == 4
    assert Path(__file__).name in caplog.text, "the log has the traceback's lines"
    assert not count_markers(caplog.text)


def test_markers_are_found_in_any_form() -> None:
    assert count_markers(f"an {MARKER.upper()} in a line") == 1
    assert count_markers(f"{NAME_MARKER}-field") == 0
    assert count_markers(f"{NAME_MARKER}-field", MARKER, NAME_MARKER) == 1
    for shift in range(3):
        assert count_markers(base64.b64encode(b"x" * shift + f"{MARKER}-prompt".encode())), shift
    assert count_markers(json.dumps({"é": f"\n{MARKER}"}))
    assert not count_markers("no marker")
