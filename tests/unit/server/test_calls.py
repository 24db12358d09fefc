"""Calls over a real channel, before services that the test plays: what is reported, counted and released."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.text_pb2 import TextInput
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.field_limit import SMALL_MESSAGE
from pomelo.status import OPEN_KEY, REFUSED_KEY
from tests.calls import as_dict, bearer, end, failure, reason_of, values_of
from tests.integration.scripted_services import (
    GATEWAY,
    KEY,
    PROOF,
    ChargedAtTheEnd,
    ScriptedServices,
    raises,
    serve_scripted,
)
from tests.waiting import until

MIB = 1024 * 1024
LIMITS = {"x-ratelimit-limit": "20", "x-ratelimit-remaining": "19"}
METHODS = pytest.mark.parametrize("method", ["RunTask", "StreamTask"])


class Recorder(ConnectionObserver):
    """Records what is reported of connections; of messages only their sizes, in `sizes`."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        self.sizes: list[int] = []

    def received(self, peer: str, size: int) -> None:
        self.sizes.append(size)

    def reset(self, peer: str) -> None:
        self.reports.append("reset")

    def checking(self, peer: str) -> None:
        self.reports.append("checking")

    def checked(self, peer: str) -> None:
        self.reports.append("checked")

    def authenticated(self, peer: str) -> None:
        self.reports.append("authenticated")

    def trust(self, peer: str) -> None:
        self.reports.append("trust")

    def ended(self, peer: str) -> None:
        self.reports.append("ended")

    def sending(self, peer: str) -> None:
        self.reports.append("sending")

    def sent(self, peer: str) -> None:
        self.reports.append("sent")


@METHODS
async def test_the_key_and_the_end_of_each_call_are_reported_to_its_connection(method: str) -> None:
    connections = Recorder()
    sent = ["sending", "sent"] if method == "RunTask" else []
    async with serve_scripted(connections=connections) as opened:
        await end(opened.task(method))
        await until(lambda: connections.reports == ["checking", "checked", "authenticated", "ended", *sent])
        connections.reports.clear()
        assert reason_of(await failure(opened.task(method, metadata=bearer("no")))) == "invalid_api_key"
        assert connections.reports == ["checking", "checked"]
        connections.reports.clear()
        assert reason_of(await failure(opened.task(method, metadata=[*bearer("no"), *GATEWAY])))
        assert connections.reports == ["checking", "checked"], "it is no proof"
        connections.reports.clear()
        unproven = PROOF.metadata("rest", "192.0.2.7", "")  # of another key
        await end(opened.task(method, metadata=[*bearer(KEY), *unproven]))
        await until(lambda: connections.reports == ["checking", "checked", "authenticated", "ended", *sent])
        connections.reports.clear()
        await end(opened.task(method, metadata=[*bearer(KEY), *GATEWAY]))
        reports = ["checking", "checked", "authenticated", "trust", "ended", *sent]
        await until(lambda: connections.reports == reports)
        await until(lambda: [visit.closed for visit in opened.services.visits] == [1, 1, 1])


async def test_the_key_of_an_account_with_too_many_calls_is_reported_as_valid() -> None:
    async def admission(call: Call) -> None:
        call.principal = Principal("acme", "key", live=False)
        raise PomeloError("concurrency_limit_exceeded")

    connections, services = Recorder(), ScriptedServices()
    services.admission = admission
    async with serve_scripted(services, connections=connections) as opened:
        assert reason_of(await failure(opened.task("RunTask"))) == "concurrency_limit_exceeded"
        await until(lambda: connections.reports == ["checking", "checked", "authenticated", "ended"])


async def test_a_call_of_one_message_with_two_is_refused() -> None:
    message = RunTaskRequest(spec=TaskSpec(model="gpt-4")).SerializeToString()
    async with serve_scripted() as opened:
        run = opened.channel.stream_unary("/pomelo.v1.TaskService/RunTask")
        error = await failure(run(iter((message, message)), metadata=bearer(KEY)))
    assert reason_of(error) == "invalid_body"
    assert error.details() == "More than one message was sent. Send one"


@METHODS
@pytest.mark.parametrize("when", ["before", "during"])
async def test_a_refusal_has_the_limits_only_in_trailing_metadata(method: str, when: str) -> None:
    error = PomeloError("rate_limit_exceeded", retry_after=7)
    async with serve_scripted(ScriptedServices(**{when: raises(error)})) as opened:  # type: ignore[arg-type]
        failed = await failure(opened.task(method))
    assert reason_of(failed) == "rate_limit_exceeded"
    trailing = as_dict(failed.trailing_metadata())
    assert trailing.items() >= LIMITS.items()
    assert (trailing["retry-after"], trailing["grpc-retry-pushback-ms"]) == ("7", "7000")
    assert not as_dict(failed.initial_metadata()).keys() & LIMITS.keys()


@pytest.mark.parametrize("fails", [False, True])
async def test_headers_known_at_the_end_of_a_stream_are_trailing_metadata(fails: bool) -> None:
    async with serve_scripted(ChargedAtTheEnd(fails=fails)) as opened:
        call = opened.task("StreamTask")
        if fails:
            assert reason_of(await failure(call)) == "provider_failed"
        else:
            await end(call)
        assert as_dict(await call.initial_metadata()).items() >= LIMITS.items()
        trailing = as_dict(await call.trailing_metadata())
        if not fails:
            call = opened.task("RunTask")
            await call
            assert as_dict(await call.trailing_metadata()).items() >= LIMITS.items()
    assert trailing["x-credits-charged"] == "0.5"
    assert "grpc-retry-pushback-ms" not in trailing, "the stream was accepted: nothing may be retried"
    assert not trailing.keys() & LIMITS.keys()


@METHODS
async def test_a_header_that_is_given_twice_is_an_error_of_the_call(method: str) -> None:
    async with serve_scripted() as opened:
        for times in (1, 2):
            metadata = [*bearer(KEY), *[("x-request-timeout", "5")] * times]
            await end(opened.task(method, metadata=metadata))
            assert (opened.services.calls[-1].header_error is None) == (times == 1)


@METHODS
@pytest.mark.parametrize("gateway", [False, True])
async def test_the_deadline_of_a_call_is_that_of_its_caller(method: str, gateway: bool) -> None:
    async with serve_scripted() as opened:
        for timeout, header, seconds in (
            (20.0, {"x_request_timeout": "40"}, 40.0 if gateway else 20.0),
            (None, {"x_request_timeout": "40"}, 40.0),
            (None, {}, 600.0),
        ):
            metadata = [*bearer(KEY, **header), *(GATEWAY if gateway else ())]
            before = time.monotonic()
            await end(opened.task(method, metadata=metadata, timeout=timeout))
            (*_, call) = opened.services.calls
            # gRPC rounds a timeout up by about a percent.
            assert before + seconds - 1 < call.deadline < time.monotonic() + seconds + 1
            assert (call.protocol, call.relayed) == (("rest", True) if gateway else ("grpc", False))
            assert call.address == ("192.0.2.7" if gateway else "127.0.0.1")


@METHODS
@pytest.mark.parametrize(("gateway", "address"), [(False, "198.51.100.9"), (True, "192.0.2.7")])
async def test_proxies_report_the_address_of_a_caller_and_gateways_that_of_theirs(
    method: str, gateway: bool, address: str
) -> None:
    metadata = bearer(KEY, x_forwarded_for="198.51.100.9")
    async with serve_scripted(trusted=["127.0.0.0/8", "192.0.2.0/24"]) as opened:
        await end(opened.task(method, metadata=[*metadata, *(GATEWAY if gateway else ())]))
        assert opened.services.calls[0].address == address


@METHODS
@pytest.mark.parametrize(
    "proof", [{}, {"x_pomelo_proof": "0" * 64}], ids=["without a proof", "a wrong proof"]
)
async def test_a_caller_behind_a_proxy_can_not_hide_its_address_by_claiming_to_be_a_gateway(
    method: str, proof: dict[str, str]
) -> None:
    metadata = bearer(KEY, x_forwarded_for="198.51.100.9", x_pomelo_wire="rest", **proof)
    async with serve_scripted(trusted=["127.0.0.0/8"]) as opened:
        await end(opened.task(method, metadata=metadata))
        assert opened.services.calls[0].address == "198.51.100.9"


async def test_a_message_of_too_many_fields_is_refused_before_it_is_parsed() -> None:
    async with serve_scripted() as opened:
        run = opened.channel.unary_unary("/pomelo.v1.TaskService/RunTask")
        many = TaskSpec(text=TextInput(stop=[""] * 60_001))
        error = await failure(run(RunTaskRequest(spec=many).SerializeToString(), metadata=bearer(KEY)))
    assert (reason_of(error), values_of(error)["field"]) == ("invalid_parameter", "stop")


@pytest.mark.parametrize(
    ("refused", "code", "size"),
    [
        ("payload_too_large 5000", "payload_too_large", 5_000),
        (f"invalid_body {9 * MIB}", "invalid_body", MIB),
        ("no_such_code many", "invalid_body", 0),
        ("missing_parameter 7", "missing_parameter", 7),
    ],
)
async def test_a_body_that_a_gateway_has_refused_is_counted_and_refused(
    refused: str, code: str, size: int
) -> None:
    async with serve_scripted() as opened:
        for metadata, error in (([*bearer(KEY), *GATEWAY], code), (bearer(KEY), "ok")):
            call = opened.task("RunTask", metadata=[*metadata, (REFUSED_KEY, refused)])
            if error == "ok":  # no gateway may be believed without its proof
                await end(call)
                continue
            assert reason_of(await failure(call)) == error
            (visit,) = opened.services.visits
            assert visit.reserved[-1] == size
            assert visit.refused == [(code, "gpt-4")]


@METHODS
async def test_a_refused_body_is_refused_by_the_visit_with_its_model(method: str) -> None:
    services = ScriptedServices(before=raises(PomeloError("invalid_body")), refusal=PomeloError("overloaded"))
    async with serve_scripted(services) as opened:
        assert reason_of(await failure(opened.task(method))) == "overloaded"
    assert services.visits[0].refused == [("invalid_body", "gpt-4")]


@pytest.mark.parametrize(("size", "counted"), [(SMALL_MESSAGE, True), (0, False)])
async def test_the_files_of_a_task_count_as_its_message(size: int, counted: bool) -> None:
    async def refuse(call: Call) -> None:
        call.file_bytes = size
        raise invalid("messages", "shorter")

    async with serve_scripted(ScriptedServices(before=refuse)) as opened:
        assert reason_of(await failure(opened.task("RunTask"))) == "invalid_parameter"
        assert bool(opened.services.visits[0].refused) == counted


async def test_the_bytes_of_a_message_are_reserved_before_it_is_parsed() -> None:
    request = RunTaskRequest(spec=TaskSpec(model="gpt-4", text=TextInput(stop=["end"])))
    async with serve_scripted() as opened:
        run = opened.channel.unary_unary("/pomelo.v1.TaskService/RunTask")
        await end(run(request.SerializeToString(), metadata=bearer(KEY)))
        assert opened.services.visits[0].reserved == [request.ByteSize()]


async def test_a_large_task_that_was_counted_already_is_not_counted_again_when_it_is_refused() -> None:
    async def refuse(call: Call) -> None:
        call.reserved, call.file_bytes = True, SMALL_MESSAGE
        raise invalid("messages", "shorter")

    async with serve_scripted(ScriptedServices(before=refuse)) as opened:
        assert reason_of(await failure(opened.task("RunTask"))) == "invalid_parameter"
        assert opened.services.visits[0].refused == []


@pytest.mark.parametrize(
    "gateway", [GATEWAY, PROOF.metadata("rest", "192.0.2.7", ""), []], ids=["proven", "not proven", "none"]
)
async def test_a_gateway_learns_that_a_stream_has_begun_before_its_first_event(
    gateway: list[tuple[str, str]],
) -> None:
    gate = asyncio.Event()

    async def wait(call: Call) -> None:
        await gate.wait()

    async with serve_scripted(ScriptedServices(during=wait)) as opened:
        call = opened.task("StreamTask", metadata=[*bearer(KEY), *gateway])
        if not gateway:
            gate.set()
        metadata = as_dict(await call.initial_metadata())
        assert metadata.get(OPEN_KEY) == ("1" if gateway else None)
        assert metadata.items() >= LIMITS.items()
        gate.set()
        assert [message.event.WhichOneof("event") async for message in call] == ["started", "text_delta"]


@pytest.mark.parametrize(("signature", "key"), [("", "no"), ("exp=1&sig=x", "no"), ("exp=1&sig=x", "")])
async def test_a_signature_replaces_a_valid_key(signature: str, key: str) -> None:
    connections = Recorder()
    async with serve_scripted(connections=connections) as opened:
        request = DownloadMediaRequest(id="media_1", signature=signature)
        call = opened.media.DownloadMedia(request, metadata=bearer(key) if key else [])
        if not signature:
            assert reason_of(await failure(call)) == "invalid_api_key"
        else:
            media, chunk = [message async for message in call]
            assert (media.media.id, chunk.chunk) == ("media_1", b"abc")
    checked = ["checking", "checked"] if key else []
    assert connections.reports == [*checked, *(["authenticated", "ended"] if signature else [])]


async def test_a_signature_does_not_replace_the_limit_of_an_account() -> None:
    services = ScriptedServices(admission=raises(PomeloError("overloaded")))
    async with serve_scripted(services) as opened:
        request = DownloadMediaRequest(id="media_1", signature="exp=1&sig=x")
        call = opened.media.DownloadMedia(request, metadata=bearer(KEY))
        assert reason_of(await failure(call)) == "overloaded"


async def test_a_chunk_may_come_first_and_have_up_to_a_mebibyte() -> None:
    whole, header = UploadMediaRequest(chunk=bytes(MIB)), UploadMediaHeader(content_type="audio/mpeg")
    async with serve_scripted() as opened:
        made = await opened.media.UploadMedia(iter([whole, whole]), metadata=bearer(KEY))
        assert (made.media.size_bytes, made.media.content_type) == (2 * MIB, "")
        named = [UploadMediaRequest(header=header), whole]
        made = await opened.media.UploadMedia(iter(named), metadata=bearer(KEY))
        assert (made.media.size_bytes, made.media.content_type) == (MIB, "audio/mpeg")
        for wrong in (UploadMediaRequest(chunk=bytes(MIB + 1)), UploadMediaRequest(chunk=b"")):
            call = opened.media.UploadMedia(iter([wrong]), metadata=bearer(KEY))
            error = await failure(call)
            assert reason_of(error) == "invalid_parameter"
            assert (
                values_of(error).items() >= {"field": "chunk", "minimum": "1", "maximum": "1048576"}.items()
            )


async def test_an_upload_with_a_wrong_header_is_refused_before_it_is_read() -> None:
    async with serve_scripted() as opened:
        metadata = bearer(KEY, x_request_timeout="soon")
        call = opened.media.UploadMedia(iter([UploadMediaRequest(chunk=b"x")]), metadata=metadata)
        error = await failure(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
        assert opened.services.uploads == 0
