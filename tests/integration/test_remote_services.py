"""The remote services in front of a server with simulated services."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pomelo.app import App
from pomelo.call import MALFORMED_KEY, REPEATED_KEY, Call
from pomelo.errors import ErrorRow, PomeloError
from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.runtime.in_flight import InFlight, InFlightLimits
from pomelo.server.call_limits import CallLimits
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.remote import open_remote
from pomelo.server.server import Server, ServerOptions, open_server
from pomelo.service import AccessService, Services, Visit, list_all_models
from pomelo.telemetry.readiness import Readiness
from tests.calls import call_of, error_parts, refusal
from tests.conftest import Keys
from tests.driver import STREAM
from tests.integration.both_ends import both_ends
from tests.integration.scripted_services import KEY, PROOF, STARTED, ChargedAtTheEnd, ScriptedServices
from tests.integration.test_remote import RUN, Run
from tests.tasks import small_task, text_task
from tests.unit.refusals import refused
from tests.waiting import until

LIMITS = {"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "19"}


@dataclass
class Peers(ConnectionObserver):
    """Records the connections of authenticated calls."""

    peers: set[str] = field(default_factory=set)

    def authenticated(self, peer: str) -> None:
        self.peers.add(peer)


@dataclass
class Ends:
    """Both ends of a channel: the simulated services and the remote ones."""

    scripted: ScriptedServices
    services: Services
    server: Server
    peers: set[str]


@asynccontextmanager
async def ends(
    scripted: ScriptedServices | None = None, in_flight: InFlightLimits | None = None, **limits: Any
) -> AsyncIterator[Ends]:
    """Opens both ends; the test must end within twenty seconds."""
    scripted, connections = scripted or ScriptedServices(), Peers()
    options = ServerOptions("127.0.0.1:0", grace=0, limits=CallLimits(**limits))
    async with (
        asyncio.timeout(20),
        open_server(scripted.services(), options, proof=PROOF, connections=connections) as server,
        open_remote(server.address, in_flight=InFlight(in_flight), proof=PROOF) as services,
    ):
        yield Ends(scripted, services, server, connections.peers)


@STREAM
@pytest.mark.parametrize(
    ("headers", "repeat_key", "strict"),
    [({"idempotency_key": "once", "prefer": "handling=strict"}, "once", True), ({}, None, False)],
)
async def test_the_caller_s_headers_reach_the_server(
    stream: bool, headers: dict[str, str], repeat_key: str | None, strict: bool
) -> None:
    async with ends() as opened:
        call = call_of(KEY, 20.0, x_request_id="mine", **headers)
        if stream:
            async with opened.services.tasks.stream_task(text_task(), TaskOptions(), call) as events:
                assert [event async for event in events]
        else:
            await opened.services.tasks.run_task(text_task(), TaskOptions(), call)
        (seen,) = opened.scripted.calls
    assert (seen.idempotency_key, seen.strict) == (repeat_key, strict)
    assert (seen.request_id, seen.protocol) == ("mine", "rest")


@pytest.mark.parametrize("secret", [KEY, "bad", None])
@pytest.mark.parametrize("key_error", [REPEATED_KEY, MALFORMED_KEY])
async def test_an_invalid_authorization_header_is_as_invalid_to_the_server(
    secret: str | None, key_error: str
) -> None:
    async with ends() as opened:
        call = call_of(secret)
        call.api_key, call.key_error = None, key_error
        assert (await refusal(opened.services.access.admit(call))).code == "invalid_api_key"
        (seen,) = opened.scripted.calls
    assert (seen.api_key, seen.key_error) == (None, call.key_error)


@pytest.mark.parametrize("fails", [False, True])
async def test_headers_known_at_the_end_of_a_stream_are_in_its_response(fails: bool) -> None:
    async with ends(ChargedAtTheEnd(fails=fails)) as opened:
        call = call_of(KEY)
        async with opened.services.tasks.stream_task(text_task(), TaskOptions(), call) as events:
            assert call.response_headers.items() >= LIMITS.items()
            assert await anext(events) == STARTED
            assert "X-Credits-Charged" not in call.response_headers
            if fails:
                assert (await refusal(anext(events))).code == "provider_failed"
            else:
                assert await anext(events, None) is None
            assert call.response_headers["X-Credits-Charged"] == "0.5"


async def test_a_stream_that_is_refused_after_its_headers_does_not_keep_the_price_of_its_result() -> None:
    async def price(call: Call) -> None:
        call.response_headers["X-Credits-Charged"] = "0.04"

    async def refuse(call: Call) -> None:
        raise PomeloError("provider_unavailable")

    async with ends(ScriptedServices(before=price, during=refuse)) as opened:
        call = call_of(KEY)
        async with opened.services.tasks.stream_task(text_task(), TaskOptions(), call) as events:
            assert call.response_headers["X-Credits-Charged"] == "0.04"
            assert (await refusal(anext(events))).code == "provider_unavailable"
            assert "X-Credits-Charged" not in call.response_headers


async def test_consecutive_calls_share_a_connection() -> None:
    async with ends() as opened:
        for number in range(250):  # more than a connection has at the same time
            call = call_of("bad" if number % 5 == 0 else KEY)
            if number % 5 == 0:
                assert (
                    await refusal(list_all_models(opened.services.models, call))
                ).code == "invalid_api_key"
            else:
                assert await list_all_models(opened.services.models, call)
        assert len(opened.peers) == 1


async def test_a_connection_carries_200_concurrent_calls() -> None:
    async def wait(call: Call) -> None:
        await asyncio.Event().wait()

    async with ends(ScriptedServices(during=wait)) as opened, AsyncExitStack() as stack:
        for _ in range(200):
            stream = opened.services.tasks.stream_task(text_task(), TaskOptions(), call_of(KEY))
            await stack.enter_async_context(stream)
        assert len(opened.peers) == 1
        await list_all_models(opened.services.models, call_of(KEY))
        assert len(opened.peers) == 2


async def test_a_valid_key_is_looked_up_once_and_an_invalid_one_each_time() -> None:
    async with ends() as opened:
        for _ in range(3):
            (await opened.services.access.admit(call_of(KEY))).close()
        assert len(opened.scripted.calls) == 1
        for _ in range(3):
            assert (await refusal(opened.services.access.admit(call_of("bad")))).code == "invalid_api_key"
        assert len(opened.scripted.calls) == 4


class RecordingAccess:
    """Admits calls like `access`, and records their keys."""

    def __init__(self, access: AccessService) -> None:
        self.keys: list[str | None] = []
        self._access = access

    async def admit(self, call: Call) -> Visit:
        self.keys.append(call.api_key)
        return await self._access.admit(call)


async def test_of_too_many_accepted_keys_the_first_is_looked_up_again(
    app: App, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.server.remote.services._MAX_TRUSTED_KEYS", 2)
    access = RecordingAccess(app.services.access)
    async with both_ends(replace(app.services, access=access)) as (_, remote):
        for key in (keys.test, keys.live, keys.only_haiku, keys.live, keys.only_haiku, keys.test):
            (await remote.access.admit(call_of(key))).close()
    assert access.keys == [keys.test, keys.live, keys.only_haiku, keys.test]


async def test_an_accepted_key_is_looked_up_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomelo.server.remote.services._TRUST_SECONDS", 0.05)
    async with ends() as opened:
        for _ in range(2):
            (await opened.services.access.admit(call_of(KEY))).close()
            await asyncio.sleep(0.1)
        assert len(opened.scripted.calls) == 2


async def test_calls_and_bytes_in_a_gateway_are_limited_per_key() -> None:
    async with ends(in_flight=InFlightLimits(account_calls=1, account_bytes=10)) as opened:
        access = opened.services.access
        visit = await access.admit(call_of(KEY))
        refused = call_of(KEY)
        assert (await refusal(access.admit(refused))).code == "overloaded"
        assert refused.response_headers.items() >= LIMITS.items()
        visit.reserve(10)
        with pytest.raises(PomeloError, match="more requests"):
            visit.reserve(1)
        visit.close()
        visit = await access.admit(call_of(KEY))
        visit.reserve(10)
        visit.close()


@pytest.mark.parametrize(
    ("refusal", "reported"),
    [(None, "invalid_body"), (PomeloError("rate_limit_exceeded"), "rate_limit_exceeded")],
    ids=["the gateway's", "the server's"],
)
async def test_an_error_of_the_server_takes_precedence_over_the_refusal_of_a_body(
    refusal: PomeloError | None, reported: str
) -> None:
    async with ends(ScriptedServices(refusal=refusal)) as opened:
        call = call_of(KEY)
        visit = await opened.services.access.admit(call)
        visit.reserve(70_000)
        error = PomeloError("invalid_body", "Invalid body: line 7")
        found = await visit.refuse(error, "gpt-4")
        assert found.code == reported
        assert refusal is not None or found is error, "the gateway's own message is kept"
        assert call.response_headers.items() >= LIMITS.items()
        last = opened.scripted.visits[-1]
        assert (last.refused, last.reserved[-1]) == ([("invalid_body", "gpt-4")], 70_000)


@pytest.mark.parametrize(
    ("refusal", "reported"),
    [
        (None, "invalid_parameter"),
        (PomeloError("unsupported_model"), "invalid_parameter"),
        (PomeloError("rate_limit_exceeded"), "rate_limit_exceeded"),
    ],
    ids=["no other error", "the model", "the limit"],
)
async def test_a_wrong_header_takes_precedence_over_the_refusal_of_a_body(
    refusal: PomeloError | None, reported: str
) -> None:
    async with ends(ScriptedServices(refusal=refusal)) as opened:
        call = call_of(KEY, idempotency_key="two words")
        visit = await opened.services.access.admit(call)
        found = await visit.refuse(PomeloError("invalid_body"), "gpt-4")
    assert found.code == reported
    assert (found is call.header_error) == (reported == "invalid_parameter")


@pytest.mark.parametrize(
    ("offset", "rest"),
    [
        (0, [b"abc", b"def"]),
        (2, [b"c", b"def"]),
        (3, [b"def"]),
        (4, [b"ef"]),
        (6, []),
    ],
)
async def test_a_download_begins_at_its_offset(offset: int, rest: list[bytes]) -> None:
    async with ends(ScriptedServices(chunks=(b"abc", b"def"))) as opened:
        opening = opened.services.media.download_media("media_1", "s", call_of(None), offset)
        async with opening as (media, chunks):
            assert media.size_bytes == 6
            assert [chunk async for chunk in chunks] == rest


async def test_a_model_is_found_by_its_id() -> None:
    async with ends() as opened:
        assert (await opened.services.models.get_model("m", call_of(KEY))).id == "m"
        with refused("model_not_found"):
            await opened.services.models.get_model("other", call_of(KEY))


async def test_a_gateway_is_ready_once_its_services_are_open() -> None:
    readiness = Readiness("server_unavailable")
    async with ends() as opened, open_remote(opened.server.address, proof=PROOF, readiness=readiness):
        assert readiness.code == ""


@pytest.mark.parametrize(("key", "code"), [(KEY, "invalid_parameter"), ("no", "invalid_api_key")])
async def test_a_download_by_key_with_a_wrong_header_is_refused(key: str, code: str) -> None:
    async with ends() as opened:
        download = opened.services.media.download_media("m", "", call_of(key, idempotency_key="two words"))
        with refused(code):
            await download.__aenter__()


async def test_a_deadline_bounds_a_download_that_is_not_read() -> None:
    async with ends() as opened:
        download = opened.services.media.download_media("media_1", "", call_of(KEY, 0.1))
        with refused("deadline_exceeded"):
            async with download:
                await asyncio.Event().wait()


async def test_the_server_deletes_the_upload_of_a_request_that_a_gateway_refuses() -> None:
    tasks: list[TaskSpec] = []
    reported: list[bool] = []

    class Deleting(ScriptedServices):
        async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
            tasks.append(spec)
            reported.append(call.reported)
            call.response_headers["X-Credits-Remaining"] = "of the deletion"
            raise PomeloError("missing_parameter")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"abc"

    async with ends(Deleting()) as opened:
        call = call_of(KEY)
        media = await opened.services.media.upload_media("audio/mpeg", chunks(), call)
        assert (media.size_bytes, media.content_type, tasks) == (3, "audio/mpeg", [])
        headers = dict(call.response_headers)
        call.end()
        await until(lambda: tasks and not opened.services.media._deletions)  # type: ignore[attr-defined]
        assert call.response_headers == headers
    assert reported == [True]  # so that the server does not report it
    (task,) = tasks
    assert (task.model, task.speech_to_text.audio.media_id) == ("", "media_1")


@RUN
async def test_an_error_that_only_a_newer_server_has_keeps_its_code_and_leaves_the_server_available(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    newer = PomeloError(ErrorRow("model_busy", 503, "UNAVAILABLE", "api_error", "Wait a moment", 2))

    async def fail(call: Call) -> None:
        raise newer

    async with ends(ScriptedServices(before=fail)) as opened:
        error = await refusal(run(opened.services, text_task(), call_of(KEY)))
    assert (error_parts(error), error.row.http) == (error_parts(newer), newer.row.http)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@STREAM
async def test_the_upload_of_a_task_is_deleted_by_the_server(stream: bool) -> None:
    async with ends() as opened:
        task = small_task("speech_to_text")
        task.speech_to_text.audio.media_id = "media_1"
        call = call_of(KEY)
        dropped = []
        call.at_end.append(lambda: dropped.append("media_1"))
        if stream:
            async with opened.services.tasks.stream_task(task, TaskOptions(), call):
                pass
        else:
            await opened.services.tasks.run_task(task, TaskOptions(), call)
        call.end()
    assert dropped == []


@pytest.mark.parametrize("has_run", [False, True], ids=["refused", "has run"])
async def test_only_the_upload_of_a_refused_task_is_deleted_by_a_request(has_run: bool) -> None:
    async def fail(call: Call) -> None:
        if has_run:
            call.response_headers["X-Credits-Charged"] = "0"
        raise PomeloError("provider_failed")

    async with ends(ScriptedServices(before=fail)) as opened:
        task = small_task("speech_to_text")
        task.speech_to_text.audio.media_id = "media_1"
        call = call_of(KEY)
        dropped = []
        call.at_end.append(lambda: dropped.append("media_1"))
        await refusal(opened.services.tasks.run_task(task, TaskOptions(), call))
        call.end()
    assert dropped == ([] if has_run else ["media_1"])
