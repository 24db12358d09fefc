"""No vendor's key, prompt or body is in any log line, error, header or file of ours, whatever goes wrong.

Every vendor's key is a canary, and so is all that callers send and vendors answer; the vendors say it all back
in every way that there is to fail. The server logs as much as can be had: the root logger at DEBUG, asyncio's
debug mode, all warnings. What is looked through: stdout and stderr, every error's status, headers, metadata
and body, and the data folder with its database.

Where canaries belong, they are: in the answers that were delivered, and in the media folder, which holds the
sounds that callers uploaded and tasks made. An unknown field or model is named to the caller who sent it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import open_app
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.providers.base import Event, Job
from pomelo.settings import Settings
from pomelo.testing import Answer, FaultUpstream, Gate, Reply
from tests.app import endow
from tests.faults.canaries import CANARY, FAULTS, NAMED, SOUND, TASKS, VENDORS, Fault, answers, found, keys
from tests.integration.commands import live_key
from tests.serving import serve
from tests.tasks import to_task

VERBOSE = "import logging\nlogging.basicConfig(level=logging.DEBUG)\n"
"""A sitecustomize.py: the root logger at DEBUG, ahead of all else."""

MODES = ("whole", "stream", "raw", "form", "grpc whole", "grpc stream")
RAW = frozenset(("eleven-labs-tts", "eleven-labs-sts", "flux-1-pro"))


@dataclass
class Heard:
    """What came back: `errors` has all but delivered output, `delivered` the output."""

    errors: list[bytes] = field(default_factory=list)
    delivered: list[bytes] = field(default_factory=list)
    calls: int = 0
    failures: int = 0


class Driver:
    """A caller with a live key on both wires, who writes down everything that comes back."""

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
        self.heard = Heard()
        self._session = session
        self._channel = channel
        self._tasks = TaskServiceStub(channel)

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What a gRPC call bears."""
        return [("authorization", f"Bearer {self.key}")]

    async def post(self, **request: Any) -> int:
        """A request of REST, and what came back; gives the status."""
        headers = {"Authorization": f"Bearer {self.key}"} | request.pop("headers", {})
        self.heard.calls += 1
        with suppress(aiohttp.ClientError):
            async with self._session.post(f"{self.url}/api/v1/task", headers=headers, **request) as answer:
                self.heard.errors.append(str((answer.reason, answer.raw_headers)).encode())
                body = b""
                try:
                    async for piece in answer.content.iter_any():
                        body += piece
                finally:
                    output, mark, error = body.partition(b"event: error")
                    failed = answer.status != 200
                    self.heard.failures += failed or bool(mark)
                    self.heard.errors.append(body if failed else error)
                    self.heard.delivered.append(b"" if failed else output)
                return answer.status
        return 0

    async def rest(self, model: str, mode: str, seconds: float) -> None:
        """A task over REST: whole, stream or raw."""
        headers = {"X-Request-Timeout": str(seconds)}
        if mode == "raw":
            headers["Accept"] = "audio/*, image/*"
        await self.post(json={"model": model, "stream": mode == "stream", **TASKS[model]}, headers=headers)

    async def form(self, model: str, mode: str, seconds: float) -> None:
        """A task with a sound, as a form with a file."""
        form = aiohttp.FormData({"model": model, "stream": str(mode == "stream").lower()})
        if model == "eleven-labs-sts":
            form.add_field("voice", "adam")
        form.add_field("audio", SOUND, filename=f"{CANARY}-file.ogg", content_type="audio/ogg")
        await self.post(data=form, headers={"X-Request-Timeout": str(seconds)})

    async def grpc(self, model: str, mode: str, seconds: float) -> None:
        """A task over gRPC: whole or stream."""
        task = to_task({"model": model, **TASKS[model]})
        given: dict[str, Any] = {"metadata": self.metadata, "timeout": seconds}
        if mode == "stream":
            call = self._tasks.StreamTask(StreamTaskRequest(task=task), **given)
        else:
            call = self._tasks.RunTask(RunTaskRequest(task=task), **given)
        await self.note(call, stream=mode == "stream")

    async def note(self, call: Any, *, stream: bool) -> None:
        """Waits for the end of a gRPC call, and writes down what came back."""
        self.heard.calls += 1
        try:
            if stream:
                async for event in call:
                    self.heard.delivered.append(event.SerializeToString())
            else:
                self.heard.delivered.append((await call).SerializeToString())
        except grpc.aio.AioRpcError as error:
            self.heard.failures += 1
            self.heard.errors.append(str(error.details()).encode())
            self.heard.errors.append(str(error.debug_error_string()).encode())
            pairs = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
            for name, value in pairs:
                self.heard.errors += [name.encode(), value if isinstance(value, bytes) else value.encode()]

    def asks(self, mode: str, seconds: float) -> list[Any]:
        """One call of each kind in a mode; a route is asked by one call at a time."""
        if mode.startswith("grpc"):
            return [self.grpc(model, mode.removeprefix("grpc "), seconds) for model in TASKS]
        if mode == "form":
            return [self.form(model, "whole", seconds) for model in ("eleven-labs-sts", "eleven-labs-stt")]
        return [self.rest(model, mode, seconds) for model in TASKS if mode != "raw" or model in RAW]

    async def through(self, fault: Fault) -> None:
        """Every kind of call, while the vendors fail so; none is refused because of those before it."""
        failed = 0
        for mode in MODES if fault.tries < 2 else ("whole", "raw", "grpc stream"):
            if failed + fault.tries > 3:
                await self.recover()
                failed = 0
            self.upstream.default = fault.script
            await asyncio.gather(*self.asks(mode, fault.timeout))
            failed += fault.tries
        if failed:
            await self.recover()

    async def recover(self) -> None:
        """So many good calls that no circuit opens: of three failures and these, less than FAILURE_RATE are
        failures, wherever a window begins."""
        for _ in range(2):
            await self.good("whole")

    async def good(self, mode: str) -> None:
        """Every kind of call, while the vendors answer."""
        self.upstream.default = answers
        await asyncio.gather(*self.asks(mode, 20.0))

    async def leave(self) -> None:
        """Callers who leave while the vendors think, on both wires."""
        for mode in ("whole", "stream", "form", "grpc whole", "grpc stream"):
            self.upstream.reset()
            self.upstream.default = Reply(before=(Gate(),))
            calls = [asyncio.create_task(ask) for ask in self.asks(mode, 20.0)]
            async with asyncio.timeout(20):
                came = [await self.upstream.received() for _ in calls]
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                for request in came:
                    await request.left.wait()
        self.upstream.default = answers

    async def wrong(self) -> None:
        """Requests that are refused: wrong names, values, keys and bodies, with canaries in all of them."""
        word = f"{CANARY}-value"
        for model, body in TASKS.items():
            bodies = [
                {"model": model, **body, name: value}
                for name in (*body, "temperature", "seed", "max_tokens", "width", "output_format", "stream")
                for value in (word, [word], {word: word}, -1, None)
            ]
            bodies.append({"model": model, **body, f"{NAMED}-field": word})
            await asyncio.gather(*[self.post(json=each) for each in bodies])
        await self.post(json={"model": f"{NAMED}-model", "messages": TASKS["gpt-4"]["messages"]})
        for role, content in ((word, word), ("user", [{"type": word, "text": word}]), ("user", [word])):
            await self.post(json={"model": "gpt-4", "messages": [{"role": role, "content": content}]})
        url = {"type": "image_url", "image_url": {"url": f"https://example.com/{word}"}}
        await self.post(json={"model": "gpt-4", "messages": [{"role": "user", "content": [url]}]})
        json_type = {"Content-Type": "application/json"}
        for data in (f'{{"model": "gpt-4", "{word}', word, f'["{word}"]', f'{{"{word}": ' * 50_000):
            await self.post(data=data.encode(), headers=json_type)
        await self.post(data=b'{"model": "gpt-4", "x": "' + word.encode() + b'\xff"}', headers=json_type)
        await self.post(data=word.encode() * 1_000_000, headers=json_type)
        await self.post(data=word.encode(), headers={"Content-Type": f"text/{word}"})
        await self.post(data=word.encode(), headers=json_type | {"Content-Encoding": word})
        form_type = {"Content-Type": "multipart/form-data; boundary=B"}
        part = f'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n{NAMED}\r\n'
        for text in (
            word,
            part,
            part + "--B",
            part.replace("form-data;", f"{word};"),
            part.replace("\r\n\r\n", f"\r\n{word}\r\n\r\n"),
            part.replace("\r\n\r\n", f"\r\nX: {word * 2000}\r\n\r\n"),
            part.replace('"model"', f'"{NAMED}-part"') + "--B--\r\n",
            part.replace("form-data; ", f'form-data; filename="{word}"; ').replace("model", "audio")
            + "--B--\r\n",
            part * 2 + "--B--\r\n",
        ):
            await self.post(data=text.encode(), headers=form_type)
        await self.post(data=word.encode(), headers={"Content-Type": f"multipart/form-data; x={word}"})
        hello = {"model": "gpt-4", **TASKS["gpt-4"]}
        for secret in (f"pml_live_{CANARY}_{CANARY}", word, f"{word}é", word * 300):
            await self.post(json=hello, headers={"Authorization": f"Bearer {secret}"})
            metadata = [("authorization", f"Bearer {secret.encode('ascii', 'ignore').decode()}")]
            request = RunTaskRequest(task=to_task(hello))
            await self.note(self._tasks.RunTask(request, metadata=metadata), stream=False)
        for name in ("Authorization", "X-Request-Timeout", "traceparent", "Accept"):
            await self.post(json=hello, headers={name: word})
        # Its answer is kept for a day, on purpose; the key itself is not, and this answer says nothing.
        self.upstream.script(Answer("Nothing to see."))
        await self.post(json=hello, headers={"Idempotency-Key": word})
        await self.post(json=hello, headers={"X-Large": word * 2000})
        await self.post(json=hello, params={word: word})
        for model, body in (("eleven-labs-tts", {"text": word, "voice": word}), ("gpt-4", {"prompt": word})):
            await self.note(
                self._tasks.RunTask(
                    RunTaskRequest(task=to_task({"model": model, **body})), metadata=self.metadata
                ),
                stream=False,
            )
        for path in ("/pomelo.v1.TaskService/RunTask", f"/pomelo.v1.TaskService/{word}"):
            garbage = self._channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
            await self.note(garbage(b"\xff\xff" + word.encode(), metadata=self.metadata), stream=False)
        media = MediaServiceStub(self._channel)
        for pieces in ([], [b""], [SOUND, b""]):
            messages = [UploadMediaRequest(content_type=word)] + [UploadMediaRequest(chunk=p) for p in pieces]
            await self.note(media.UploadMedia(iter(messages), metadata=self.metadata), stream=False)

    async def malformed(self, host: str, port: int) -> None:
        """What is no HTTP, or a wrong one."""
        word = f"{CANARY}-wire".encode()
        head = b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + word + b"\r\n"
        for request in (
            word + b"\r\n\r\n",
            b"GET /" + word + b" HTTP/9.9\r\n\r\n",
            b"GET /" + word * 2000 + b" HTTP/1.1\r\n\r\n",
            b"GET /%ff" + word + b"\xff HTTP/1.1\r\nHost: x\r\n\r\n",
            head + word + b"\r\n\r\n",
            head + b"X: " + word * 2000 + b"\r\n\r\n",
            head + b"X: \0" + word + b"\r\n\r\n",
            head + b"Content-Length: " + word + b"\r\n\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\n" + word,
            head + b"Transfer-Encoding: " + word + b"\r\n\r\n" + word,
            head + b"Content-Length: 500\r\nContent-Type: application/json\r\n\r\n" + word,
            head + (b"Y: " + word + b"\r\n") * 200 + b"\r\n",
        ):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(request)
            writer.write_eof()
            with suppress(ConnectionError):
                async with asyncio.timeout(20):
                    self.heard.errors.append(await reader.read())
            self.heard.calls += 1
            writer.close()


def base_urls(upstream: FaultUpstream) -> dict[str, str]:
    """Every vendor's base URL as the upstream plays it."""
    return {f"{vendor.upper()}_BASE_URL": getattr(upstream, f"{vendor}_base_url") for vendor in VENDORS}


@pytest.fixture
async def own_upstream() -> AsyncIterator[FaultUpstream]:
    """Vendors of this test alone."""
    async with FaultUpstream() as server:
        yield server


def assert_discreet(heard: Heard) -> None:
    """No error has a canary, and the answers that were delivered have many."""
    assert heard.failures > 100
    told = [error for error in heard.errors if found(error)]
    assert not told, told[:3]
    assert found(b"".join(heard.delivered)) > 10


@pytest.mark.timeout(300)
async def test_a_server_tells_nobody(tmp_path: Path, own_upstream: FaultUpstream) -> None:
    (tmp_path / "verbose").mkdir()
    (tmp_path / "verbose" / "sitecustomize.py").write_text(VERBOSE)
    variables = keys() | base_urls(own_upstream)
    variables |= {
        "PYTHONPATH": str(tmp_path / "verbose"),
        "PYTHONWARNINGS": "default",
        "PYTHONASYNCIODEBUG": "1",
    }
    async with serve(tmp_path, **variables) as served, aiohttp.ClientSession() as session:
        key = await live_key(tmp_path)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
            driver = Driver(served.url, channel, session, key, own_upstream)
            for mode in MODES:
                await driver.good(mode)
            for fault in FAULTS.values():
                await driver.through(fault)
            await driver.leave()
            await driver.wrong()
            await driver.malformed(served.host, served.port)
            await driver.good("whole")
    heard = driver.heard
    assert_discreet(heard)

    log = served.output.read_bytes()
    lines = log.splitlines()
    told = [line for line in lines if found(line, CANARY, NAMED) or key.split("_")[-1].encode() in line]
    assert not told, told[:5]
    assert b"DEBUG" in log, "the log is as verbose as can be"
    assert len(lines) > 20

    media = served.data / "media"
    shown = 0
    files = [path for path in served.data.rglob("*") if path.is_file()]
    for path in files:
        assert not found(path.name, CANARY, NAMED)
        if path.parent == media:
            shown += found(path.read_bytes())
        else:
            data = path.read_bytes()
            assert not found(data, CANARY, NAMED), path.name
            assert key.split("_")[-1].encode() not in data, path.name
    assert shown, "the sounds themselves are kept, and nothing else"
    logging.getLogger(__name__).info(
        "%d calls, %d failures, %d log lines, %d files", heard.calls, heard.failures, len(lines), len(files)
    )


@contextmanager
def debugging() -> Iterator[None]:
    """asyncio's debug mode, for as long as it is entered."""
    loop = asyncio.get_running_loop()
    before = loop.get_debug()
    loop.set_debug(True)
    try:
        yield
    finally:
        loop.set_debug(before)


@pytest.mark.timeout(300)
async def test_no_logger_tells(
    tmp_path: Path, own_upstream: FaultUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    vendors = {name.lower(): value for name, value in (keys() | base_urls(own_upstream)).items()}
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data", **vendors)
    async with open_app(settings) as app, aiohttp.ClientSession() as session:
        assert app.rest is not None
        assert app.grpc is not None
        await endow(app.store)
        _, key = await app.keyring.create(live=True)
        async with grpc.aio.insecure_channel(app.grpc) as channel:
            driver = Driver("http://{}:{}".format(*app.rest), channel, session, key, own_upstream)
            with debugging():
                await driver.good("stream")
                for name in (
                    "400",
                    "500",
                    "a page",
                    "cut within an event",
                    "no HTTP",
                    "a bad chunk",
                    "closed",
                ):
                    await driver.through(FAULTS[name])
                await driver.leave()
                await driver.malformed(*app.rest)
    assert_discreet(driver.heard)
    logging.getLogger("tests").debug("a line of the test's own")
    assert "a line of the test's own" in caplog.text, "the loggers are heard"
    assert not found(caplog.text), [line for line in caplog.text.splitlines() if found(line)][:5]


class Careless:
    """A provider as a stranger may plug it in: it raises what it was given, and what it was answered."""

    configured = True

    async def text(self, job: Job) -> AsyncIterator[Event]:
        """See JobMethod."""
        try:
            raise KeyError(f"{CANARY}-answer")
        except KeyError as error:
            error.add_note(f"{CANARY}-note")
            raise ExceptionGroup(f"{CANARY}-group", [ValueError(repr(job.input))]) from error
        yield Event()

    async def aclose(self) -> None:
        """See Provider."""


async def test_what_nobody_foresaw_is_logged_without_what_it_says(
    tmp_path: Path, own_upstream: FaultUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data")
    async with (
        open_app(settings, providers={"openai": Careless()}) as app,
        aiohttp.ClientSession() as session,
    ):
        assert app.rest is not None
        assert app.grpc is not None
        await endow(app.store)
        _, key = await app.keyring.create(live=True)
        async with grpc.aio.insecure_channel(app.grpc) as channel:
            driver = Driver("http://{}:{}".format(*app.rest), channel, session, key, own_upstream)
            for mode in ("whole", "stream"):
                await driver.rest("gpt-4", mode, 10.0)
                await driver.grpc("gpt-4", mode, 10.0)
    assert driver.heard.failures == driver.heard.calls == 4
    assert not [error for error in driver.heard.errors if found(error)]
    assert caplog.text.count("failed unexpectedly") == 4
    assert caplog.text.count("builtins.ExceptionGroup") == 4
    assert caplog.text.count("builtins.KeyError") == caplog.text.count("builtins.ValueError") == 4
    assert Path(__file__).name in caplog.text, "the place is told"
    assert not found(caplog.text)


def test_a_canary_is_found_wherever_it_is() -> None:
    assert found(f"an {CANARY.upper()} in a line") == 1
    assert found(f"{NAMED}-field") == 0
    assert found(f"{NAMED}-field", CANARY, NAMED) == 1
    for shift in range(3):
        assert found(base64.b64encode(b"x" * shift + f"{CANARY}-prompt".encode())), shift
    assert found(json.dumps({"é": f"\n{CANARY}"}))
    assert not found("nothing to see")
