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
import itertools
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import open_app
from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import TextInput
from pomelo.providers.base import Event, Job, Provider
from pomelo.secrets import DATABASE
from pomelo.settings import Settings
from pomelo.testing import Answer, FaultUpstream, Gate, Reply
from tests.app import endow
from tests.calls import bearer
from tests.faults.leak_markers import (
    AUDIO,
    FAULTS,
    LABEL_MARKER,
    MARKER,
    MARKERS,
    NAME_MARKER,
    TASKS,
    Fault,
    answers,
    base_urls,
    count_markers,
    keys,
)
from tests.faults.leak_requests import (
    HELLO,
    SECRETS,
    WORD,
    invalid_fields,
    invalid_posts,
    labelled,
    malformed_requests,
)
from tests.integration.commands import live_key
from tests.ports import free_port
from tests.scrapes import scrape
from tests.serving import serve
from tests.tasks import to_options

VERBOSE = "import logging\nlogging.basicConfig(level=logging.DEBUG)\n"
"""A sitecustomize.py that sets the root logger to DEBUG before any other import."""

MODES = ("whole", "stream", "raw", "form", "grpc whole", "grpc stream")
RAW = frozenset(("eleven-labs-tts", "eleven-labs-sts", "flux-1-pro"))


class Driver:
    """Makes calls with a live key over both protocols, and records everything it receives: `delivered` is output,
    `errors` is everything else."""

    def __init__(
        self,
        url: str,
        channel: grpc.aio.Channel,
        session: aiohttp.ClientSession,
        key: str,
        upstream: FaultUpstream,
    ) -> None:
        self.url = url
        self.key = key
        self.upstream = upstream
        self.errors: list[bytes] = []
        self.delivered: list[bytes] = []
        self.call_count = self.failure_count = 0
        self.metadata = bearer(key)
        self._session = session
        self._channel = channel
        self._tasks = TaskServiceStub(channel)

    async def post(self, **request: Any) -> int:
        """Posts a REST request and records the response; returns the status, or 0 without a response."""
        headers = {"Authorization": f"Bearer {self.key}"} | request.pop("headers", {})
        self.call_count += 1
        with suppress(aiohttp.ClientError):
            async with self._session.post(f"{self.url}/api/v1/task", headers=headers, **request) as response:
                self.errors.append(str((response.reason, response.raw_headers)).encode())
                body = b""
                try:
                    async for data in response.content.iter_any():
                        body += data
                finally:
                    output, error_event, error = body.partition(b"event: error")
                    failed = response.status != 200
                    self.failure_count += failed or bool(error_event)
                    self.errors.append(body if failed else error)
                    self.delivered.append(b"" if failed else output)
                return response.status
        return 0

    async def rest(self, model: str, mode: str, seconds: float) -> None:
        """Runs a task over REST; `mode` is whole, stream or raw."""
        headers = {"X-Request-Timeout": str(seconds)}
        if mode == "raw":
            headers["Accept"] = "audio/*, image/*"
        await self.post(json={"model": model, "stream": mode == "stream", **TASKS[model]}, headers=headers)

    async def form(self, model: str, mode: str, seconds: float) -> None:
        """Runs a task with audio over REST, as a form with a file."""
        form = aiohttp.FormData({"model": model, "stream": str(mode == "stream").lower()})
        if model == "eleven-labs-sts":
            form.add_field("voice", "adam")
        form.add_field("audio", AUDIO, filename=f"{MARKER}-file.ogg", content_type="audio/ogg")
        await self.post(data=form, headers={"X-Request-Timeout": str(seconds)})

    async def grpc(self, model: str, mode: str, seconds: float) -> None:
        """Runs a task over gRPC; `mode` is whole or stream."""
        body = {"model": model, **TASKS[model]}
        if mode == "stream":
            request = StreamTaskRequest(spec=labelled(body), options=to_options(body, stream=True))
            await self.record(self._tasks.StreamTask(request, metadata=self.metadata, timeout=seconds))
        else:
            await self.run_task(body, metadata=self.metadata, timeout=seconds)

    async def run_task(self, body: Mapping[str, Any], **options: Any) -> None:
        request = RunTaskRequest(spec=labelled(body), options=to_options(body))
        await self.record(self._tasks.RunTask(request, **options))

    async def record(self, call: Any) -> None:
        """Waits for the end of a gRPC call, and records what was received."""
        self.call_count += 1
        try:
            if hasattr(call, "__aiter__"):
                async for event in call:
                    self.delivered.append(event.SerializeToString())
            else:
                self.delivered.append((await call).SerializeToString())
        except grpc.aio.AioRpcError as error:
            self.failure_count += 1
            self.errors.append(str(error.details()).encode())
            self.errors.append(str(error.debug_error_string()).encode())
            pairs = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
            for part in itertools.chain.from_iterable(pairs):
                self.errors.append(part if isinstance(part, bytes) else part.encode())

    def calls(self, mode: str, seconds: float) -> list[Any]:
        """A call of every model in a mode; each model has its own route."""
        if mode.startswith("grpc"):
            return [self.grpc(model, mode.removeprefix("grpc "), seconds) for model in TASKS]
        if mode == "form":
            return [self.form(model, "whole", seconds) for model in ("eleven-labs-sts", "eleven-labs-stt")]
        return [self.rest(model, mode, seconds) for model in TASKS if mode != "raw" or model in RAW]

    async def run_fault(self, fault: Fault) -> None:
        """Makes calls in every mode while the vendors have this fault. Keeps all circuit breakers closed."""
        failures = 0
        for mode in MODES if fault.failures < 2 else ("whole", "raw", "grpc stream"):
            if failures + fault.failures > 3:
                await self.recover()
                failures = 0
            self.upstream.default = fault.script
            await asyncio.gather(*self.calls(mode, fault.timeout))
            failures += fault.failures
        if failures:
            await self.recover()

    async def recover(self) -> None:
        """Makes so many successful calls that no circuit breaker opens: with three failures, the rate stays
        below FAILURE_RATE in every window."""
        for _ in range(2):
            await self.run_good("whole")

    async def run_good(self, mode: str) -> None:
        """Makes calls of every model while the vendors answer."""
        self.upstream.default = answers
        await asyncio.gather(*self.calls(mode, 20.0))

    async def cancel_calls(self) -> None:
        """Makes calls in every mode, and cancels them while they wait for a vendor."""
        for mode in ("whole", "stream", "form", "grpc whole", "grpc stream"):
            self.upstream.reset()
            self.upstream.default = Reply(before=(Gate(),))
            calls = [asyncio.create_task(call) for call in self.calls(mode, 20.0)]
            async with asyncio.timeout(20):
                received = [await self.upstream.received() for _ in calls]
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                for request in received:
                    await request.left.wait()
        self.upstream.default = answers

    async def send_invalid(self) -> None:
        """Sends requests that are refused, with markers in all."""
        for model in TASKS:
            await asyncio.gather(*[self.post(json=body) for body in invalid_fields(model)])
        for request in invalid_posts():
            await self.post(**request)
        for secret in SECRETS:
            metadata = [("authorization", f"Bearer {secret.encode('ascii', 'ignore').decode()}")]
            await self.run_task(HELLO, metadata=metadata)
        # The answer is stored for a day, so it has no marker; the Idempotency-Key itself is not stored.
        self.upstream.script(Answer("No marker."))
        await self.post(json=HELLO, headers={"Idempotency-Key": WORD})
        for body in (
            {"model": "eleven-labs-tts", "text": WORD, "voice": WORD},
            {"model": "gpt-4", "prompt": WORD},
        ):
            await self.run_task(body, metadata=self.metadata)
        for path in ("/pomelo.v1.TaskService/RunTask", f"/pomelo.v1.TaskService/{WORD}"):
            garbage = self._channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
            await self.record(garbage(b"\xff\xff" + WORD.encode(), metadata=self.metadata))
        media = MediaServiceStub(self._channel)
        for chunks in ([], [b""], [AUDIO, b""]):
            messages = [UploadMediaRequest(header=UploadMediaHeader(content_type=WORD))] + [
                UploadMediaRequest(chunk=c) for c in chunks
            ]
            await self.record(media.UploadMedia(iter(messages), metadata=self.metadata))

    async def send_malformed(self, host: str, port: int) -> None:
        for request in malformed_requests():
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(request)
            writer.write_eof()
            with suppress(ConnectionError):
                async with asyncio.timeout(20):
                    self.errors.append(await reader.read())
            self.call_count += 1
            writer.close()


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
            for fault in FAULTS.values():
                await driver.run_fault(fault)
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
