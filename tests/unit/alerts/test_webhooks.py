"""The delivery of alerts to a real receiver."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from pomelo.alerts import webhooks as module
from pomelo.alerts.alert import Alert, encode_secret, signed_headers, signing_keys
from pomelo.alerts.webhooks import Webhooks, open_webhooks, origin
from tests.alerts import Receiver, open_receiver
from tests.certificates import make_certificate
from tests.waiting import until
from tests.web_server import serve_application

KEYS = (b"k" * 32, b"the former key, which is replaced")
ALERT = Alert("alert_1", "balance.low", 1_700_000_000.5, {"account": "acme", "available_micros": 5})


@pytest.fixture(name="receiver")
async def _receiver() -> AsyncIterator[Receiver]:
    async with open_receiver(KEYS) as receiver:
        yield receiver


@asynccontextmanager
async def silent_receiver() -> AsyncIterator[tuple[str, list[int]]]:
    """A receiver that never answers, and a list with an item for each request that reached it."""
    requests: list[int] = []

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.readline()
            requests.append(1)
            await reader.read()
        writer.close()

    async with await asyncio.start_server(read, "127.0.0.1", 0) as server:
        yield "http://{}:{}/secret-path".format(*server.sockets[0].getsockname()), requests


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def sender(session: aiohttp.ClientSession, *urls: str, attempts: int = 5) -> Webhooks:
    """Webhooks that repeat quickly."""
    return Webhooks(session, urls, KEYS, waits=(0.01,) * (attempts - 1))


def test_the_signature_is_that_of_standard_webhooks() -> None:
    # The example of the specification's libraries.
    (key,) = signing_keys(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], [b"root"])
    alert = Alert("msg_p5jXN8AQM9LWM0D4loKWxJek", "", 0.0, {})
    headers = signed_headers(alert, b'{"test": 2432232314}', [key], 1614265330)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert encode_secret(key) == "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_without_a_secret_of_their_own_alerts_are_signed_with_one_of_each_root_secret() -> None:
    current, former = signing_keys([], [b"root", b"former root"])
    assert len(current) == len(former) == 32
    assert current != former
    # Receivers were given it: it is the same in every version.
    assert signing_keys([], [b"root"]) == (current,) == (hmac.digest(b"root", b"alerts\x01", "sha256"),)
    assert signing_keys(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], [b"root"]) != (current,)


async def test_an_alert_is_repeated_with_its_id_until_the_receiver_has_it(
    receiver: Receiver, session: aiohttp.ClientSession
) -> None:
    receiver.answers = [500, 302, 404]
    webhooks = sender(session, receiver.url)
    webhooks.send(ALERT)
    await until(lambda: bool(receiver.received))
    assert receiver.attempts == 4  # a redirection was not followed
    assert {headers["id"] for headers in receiver.headers} == {"alert_1"}
    # The time of the attempt, not of the alert: receivers refuse old signatures.
    assert all(abs(int(headers["timestamp"]) - time.time()) < 60 for headers in receiver.headers)
    assert receiver.received == [
        {
            "id": "alert_1",
            "type": "balance.low",
            "timestamp": "2023-11-14T22:13:20.500Z",
            "data": {"account": "acme", "available_micros": 5},
        }
    ]
    await webhooks.close()


async def test_a_redirection_to_a_page_is_not_followed(session: aiohttp.ClientSession) -> None:
    async def redirect(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async def other(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/", redirect)
    app.router.add_post("/elsewhere", other)
    async with serve_application(app) as url:
        assert await sender(session).post(ALERT, f"{url}/") == f"{url} answered 307"


async def test_an_alert_that_is_never_taken_is_given_up_and_the_log_hides_the_path(
    receiver: Receiver, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [500] * 5
    sender(session, receiver.url).send(ALERT)
    await until(lambda: "given up" in caplog.text)
    assert receiver.attempts == 5
    lines = [record for record in caplog.records if record.name == "pomelo.alerts"]
    assert [record.levelno for record in lines] == [logging.WARNING] * 4 + [logging.ERROR]
    assert "alert_1 (balance.low) was given up after 5 attempts" in lines[-1].getMessage()
    assert "answered 500" in lines[-1].getMessage()
    assert "secret-path" not in caplog.text


async def test_each_repetition_has_a_wait_of_its_own(
    receiver: Receiver, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [500, 500]
    webhooks = Webhooks(session, [receiver.url], KEYS, waits=(0.01, 1_000.0))
    webhooks.send(ALERT)
    await until(lambda: caplog.text.count("Next attempt") == 2)
    waits = [float(text) for text in re.findall(r"Next attempt in (\d+) s", caplog.text)]
    assert waits[0] == 0
    assert 800 <= waits[1] <= 1_200
    await webhooks.close()
    assert len(receiver.received) == 1


async def test_a_receiver_that_fails_delays_no_other(
    receiver: Receiver, session: aiohttp.ClientSession
) -> None:
    async with open_receiver(KEYS) as other:
        receiver.answers = [500] * 1000
        webhooks = sender(session, receiver.url, other.url, attempts=1000)
        webhooks.send(ALERT)
        await until(lambda: bool(other.received))
        assert not receiver.received
        await webhooks.close()
    assert other.attempts == 1


async def test_too_many_alerts_are_dropped(
    receiver: Receiver,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    webhooks = sender(session, receiver.url)
    for _ in range(5):
        webhooks.send(ALERT)
    await until(lambda: len(receiver.received) == 3)
    assert caplog.text.count("was dropped") == 2
    await webhooks.close()


async def test_what_waits_when_the_process_ends_gets_a_last_attempt(
    receiver: Receiver, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_receiver(KEYS) as other:
        receiver.answers, other.answers = [500], [500, 500]
        webhooks = Webhooks(session, [receiver.url, other.url], KEYS)
        webhooks.send(ALERT)
        await until(lambda: caplog.text.count("Next attempt") == 2)
        await webhooks.close()
        assert [each.attempts for each in (receiver, other)] == [2, 2]
    assert [alert["id"] for alert in receiver.received] == ["alert_1"]
    assert "given up after 2 attempts" in caplog.text
    assert "because it ends: 1" in caplog.text


async def test_an_attempt_that_fails_while_the_process_ends_is_repeated(
    session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    requests: list[int] = []
    ending = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        requests.append(1)
        await ending.wait()
        return web.Response(status=500 if len(requests) == 1 else 200)

    app = web.Application()
    app.router.add_post("/", answer)
    async with serve_application(app) as url:
        webhooks = Webhooks(session, [f"{url}/"], KEYS)
        webhooks.send(ALERT)
        await until(lambda: requests == [1])
        closing = asyncio.create_task(webhooks.close())
        await asyncio.sleep(0)  # it has begun
        ending.set()
        await closing
    assert requests == [1, 1]
    assert "because it ends" not in caplog.text


async def test_the_end_reports_nothing_if_every_alert_was_delivered(
    receiver: Receiver, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    webhooks = Webhooks(session, [receiver.url], KEYS)
    webhooks.send(ALERT)
    await webhooks.close()
    assert [alert["id"] for alert in receiver.received] == ["alert_1"]
    assert caplog.messages == []


async def test_the_last_attempts_have_a_limit_of_time(
    monkeypatch: pytest.MonkeyPatch, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CLOSING_TIMEOUT", 0.05)
    async with silent_receiver() as (url, requests):
        webhooks = Webhooks(session, [url], KEYS)
        webhooks.send(ALERT)
        await until(lambda: requests == [1])
        async with asyncio.timeout(20):
            await webhooks.close()
    assert "because it ends: 1" in caplog.text


async def test_a_receiver_has_only_so_long_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    async with silent_receiver() as (url, _), open_webhooks([], KEYS) as webhooks, asyncio.timeout(20):
        assert await webhooks.post(ALERT, url) == f"{origin(url)} did not answer within 0.05 s"


async def test_a_receiver_that_does_not_answer_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 300.0)
    monkeypatch.setattr(module, "CLOSING_TIMEOUT", 0.01)
    async with (
        open_receiver(KEYS) as other,
        silent_receiver() as (url, requests),
        open_webhooks([url, other.url], KEYS) as webhooks,
    ):
        for _ in range(3 * module.MAX_REQUESTS):
            webhooks.send(ALERT)
        await until(lambda: len(other.received) == 3 * module.MAX_REQUESTS)
        await until(lambda: len(requests) == module.MAX_REQUESTS)


async def test_alerts_that_are_dropped_for_one_receiver_are_sent_to_the_others(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    monkeypatch.setattr(module, "CLOSING_TIMEOUT", 0.01)
    async with silent_receiver() as (url, _), open_webhooks([url, receiver.url], KEYS) as webhooks:
        for count in range(1, 4):
            webhooks.send(ALERT)
            await until(lambda: not webhooks._receivers[1].pending)
            assert len(receiver.received) == count
        assert caplog.text.count(f"too many wait for delivery to {origin(url)}") == 1


async def test_a_receiver_that_is_not_there_or_has_no_valid_certificate_is_named(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"http://127.0.0.1:{port}/secret-path"
    webhooks = sender(session, url)
    assert await webhooks.post(ALERT, url) == f"http://127.0.0.1:{port} can't be reached"
    make_certificate(tmp_path, "server", "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        own = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        failure = await webhooks.post(ALERT, f"{own}/secret-path")
        assert failure == f"TLS with {own} failed: its certificate has to be valid"
