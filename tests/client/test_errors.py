"""Each error code has its own exception, with what the server says about it."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import ErrorInfo

from pomelo import client as package
from pomelo.client import (
    ApiError,
    ClientClosed,
    DeadlineExceeded,
    IncompleteStream,
    InsufficientCredits,
    InvalidApiKey,
    InvalidParameter,
    ModelNotAllowed,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    PomeloClientError,
    ProviderFailed,
    RateLimitExceeded,
    ServerUnavailable,
    UnsupportedModel,
)
from pomelo.client.errors import to_error
from pomelo.errors import TABLE
from pomelo.status import DOMAIN, details_metadata
from tests.app import RunningApp, app_fixture
from tests.client.clients import KINDS, make_client, read
from tests.client.conftest import ClientFactory
from tests.conftest import Keys
from tests.ports import free_port

server = app_fixture()

PROVOKED = sorted(
    set(TABLE) - {"not_found", "method_not_allowed", "unsupported_media_type", "model_not_found"}
)
"""The codes for which the sandbox has a trigger."""


def test_every_code_has_exactly_one_public_class() -> None:
    classes = ApiError.__subclasses__()
    assert sorted(each.code for each in classes) == sorted(TABLE)
    for each in classes:
        assert each.__name__ == "".join(word.capitalize() for word in each.code.split("_"))
        assert getattr(package, each.__name__) is each
        assert each.__name__ in package.__all__
    assert issubclass(ApiError, PomeloClientError)


@pytest.mark.parametrize("code", PROVOKED)
async def test_every_error_of_a_task_is_raised_as_its_class(code: str, client: Any) -> None:
    with pytest.raises(ApiError) as caught:
        await client.text("gpt-4", f"[[error:{code}]]", retries=0, request_id="req-of-mine")
    error = caught.value
    assert type(error).code == code
    assert error.retry_after == TABLE[code].retry_after
    assert error.request_id == "req-of-mine"
    assert str(error) == f"{code}: {error.message} (req-of-mine)"
    with pytest.raises(type(error)):
        async with client.stream("gpt-4", f"[[error:{code}]]", retries=0):
            pytest.fail("the stream has begun")


async def test_an_error_names_the_field_and_the_values(client: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        await client.text("gpt-4", "Hi", temperature=3)
    assert caught.value.field == "temperature"
    assert caught.value.values["maximum"] == "2"
    assert caught.value.retry_after is None
    with pytest.raises(UnsupportedModel, match="no-such-model"):
        await client.text("no-such-model", "Hi")
    with pytest.raises(ModelNotFound) as missing:
        await client.model("no-such-model")
    assert missing.value.values["model"] == "no-such-model"


async def test_an_error_can_be_pickled(client: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        await client.text("gpt-4", "Hi", temperature=3)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), copy.message, copy.field) == (InvalidParameter, caught.value.message, "temperature")
    assert copy.request_id == caught.value.request_id


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_that_is_newer_than_the_client_keeps_what_the_server_says(kind: str) -> None:
    status = status_pb2.Status(code=7, message="The region is closed. Use another")
    values = {"field": "region", "region": "eu"}
    status.details.add().Pack(ErrorInfo(reason="REGION_CLOSED", domain=DOMAIN, metadata=values))

    async def refuse(request: bytes, context: Any) -> bytes:
        metadata = (*details_metadata(status), ("x-request-id", "req_1"))
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, status.message, metadata)
        return b""

    newer = grpc.aio.server()
    handlers = {"GetAccount": grpc.unary_unary_rpc_method_handler(refuse)}
    newer.add_registered_method_handlers("pomelo.v1.AccountService", handlers)
    port = newer.add_insecure_port("127.0.0.1:0")
    await newer.start()
    client = make_client(kind, f"127.0.0.1:{port}", "key")
    with pytest.raises(ApiError) as caught:
        await client.account()
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (type(error), error.code, error.message) == (ApiError, "region_closed", status.message)
        assert (error.field, error.values, error.request_id) == ("region", {"region": "eu"}, "req_1")
    await client.close()
    await newer.stop(None)


async def test_a_bad_key_is_refused_by_every_method(connect: ClientFactory, keys: Keys) -> None:
    for key in (keys.revoked, keys.expired, "pml_test_wrong"):
        client = connect(key)
        for call in (client.text("gpt-4", "Hi"), client.account(), client.upload(b"\0" * 2**22)):
            with pytest.raises(InvalidApiKey) as caught:
                await call
            assert caught.value.__suppress_context__  # the trace does not show grpc's own error
        with pytest.raises(InvalidApiKey):
            _ = [model async for model in client.models()]
        with pytest.raises(InvalidApiKey):
            async with client.stream("gpt-4", "Hi"):
                pytest.fail("the stream has begun")
    with pytest.raises(ModelNotAllowed):
        await connect(keys.only_haiku).text("gpt-4", "Hi")


async def test_a_missing_file_and_too_large_a_file_are_refused(client: Any, tmp_path: Any) -> None:
    with pytest.raises(NotFound):
        await client.download("media_none.png", tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PayloadTooLarge):
        await client.upload(bytes(60 * 2**20))
    with pytest.raises(FileNotFoundError):
        await client.upload(tmp_path / "none.wav")
    with pytest.raises(FileNotFoundError):
        await client.transcribe("eleven-labs-stt", tmp_path / "none.wav")


async def test_a_message_that_grpc_itself_refuses_is_too_large(client: Any) -> None:
    for prompt in ("x" * (10 * 2**20), "x" * (19 * 2**20)):
        with pytest.raises(PayloadTooLarge):
            await client.text("gpt-4", prompt)
        with pytest.raises(PayloadTooLarge):
            async with client.stream("gpt-4", prompt):
                pytest.fail("the stream has begun")


class BrokenFile:
    """A file whose reading fails after the first chunk."""

    def __init__(self, error: Exception) -> None:
        self._chunks = [b"some audio"]
        self._error = error

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        if self._chunks:
            return self._chunks.pop()
        raise self._error


@pytest.mark.parametrize("error", [OSError("the disk is gone"), TimeoutError("the disk is gone")], ids=repr)
async def test_the_error_of_a_file_ends_the_upload(client: Any, error: Exception) -> None:
    with pytest.raises(OSError, match="the disk is gone"):  # also that of a network's file system
        await client.upload(BrokenFile(error))
    assert (await client.account()).plan


async def test_a_stream_that_fails_half_way_raises_its_error_after_the_pieces(client: Any) -> None:
    pieces: list[str] = []
    stream = client.stream("gpt-4", "[[words:40]] [[cut]]")
    with pytest.raises(ProviderFailed) as caught:
        await read(stream, pieces)
    assert caught.value.__suppress_context__
    assert caught.value.request_id.startswith("req_")
    assert len("".join(pieces).split()) == 20
    with pytest.raises(IncompleteStream):
        _ = stream.result


@pytest.mark.parametrize("kind", KINDS)
async def test_the_limits_are_those_of_the_account(kind: str, server: RunningApp) -> None:
    account = await server.account("five", test=10**6)
    client = make_client(kind, str(server.server.grpc), account.test, retries=0)
    for left in (4, 3, 2, 1, 0):
        result = await client.text("gpt-4", "[[words:3]] Hi")
        assert (result.limits.requests.limit, result.limits.requests.remaining) == (5, left)
    with pytest.raises(RateLimitExceeded) as caught:
        await client.text("gpt-4", "Hi")
    error = caught.value
    assert error.limits.requests is not None
    assert error.limits.requests.remaining == 0
    assert error.limits.requests.reset is not None
    assert error.limits.requests.reset > datetime.now(UTC)
    assert error.values["quota"] == "requests_per_minute"
    assert error.retry_after is not None
    assert 0 < error.retry_after <= 60
    poor = await server.account(test=10)
    client = make_client(kind, str(server.server.grpc), poor.test)
    with pytest.raises(InsufficientCredits) as refused:
        await client.text("gpt-4", "Hi", max_tokens=1000)
    assert refused.value.limits.credits is not None
    await client.close()


async def test_a_server_that_is_not_there_is_named(connect: ClientFactory) -> None:
    target = f"127.0.0.1:{free_port()}"
    with pytest.raises(ServerUnavailable, match=f"The connection to {target} failed") as caught:
        await connect("pml_test_x", target, retries=0).account()
    assert caught.value.request_id == ""


def test_an_error_of_a_proxy_names_the_server() -> None:
    metadata = grpc.aio.Metadata(("server", "envoy"))
    error = to_error(grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata), "pomelo:443")
    assert isinstance(error, ServerUnavailable)
    assert error.message.startswith("The connection to pomelo:443 failed")


async def test_the_timeout_bounds_a_call(client: Any) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.text("gpt-4", "[[delay:60]]", timeout=0.3)
    with pytest.raises(DeadlineExceeded):
        await read(client.stream("gpt-4", "[[stall]]", timeout=1), [])
    with pytest.raises(DeadlineExceeded):
        await client.text("gpt-4", "Hi", timeout=0)


async def test_a_closed_client_makes_no_calls(connect: ClientFactory, keys: Keys) -> None:
    client = connect(keys.test)
    assert (await client.account()).plan
    await client.close()
    await client.close()
    with pytest.raises(ClientClosed):
        await client.text("gpt-4", "Hi")
    with pytest.raises(ClientClosed):
        async with client.stream("gpt-4", "Hi"):
            pytest.fail("the stream has begun")


async def test_the_error_of_a_refused_upload_is_the_servers(
    connect: ClientFactory, keys: Keys, tmp_path: Any
) -> None:
    # Whether a write fails before or after the refusal arrives is a race: grpc.aio then has an error of its own.
    path = tmp_path / "long.wav"
    path.write_bytes(bytes(8 * 2**20))
    client = connect(keys.test)
    for timeout in range(20):
        with pytest.raises((DeadlineExceeded, InvalidParameter)):
            await client.transcribe("eleven-labs-stt", path, timeout=0.005 + 0.001 * timeout, retries=0)
