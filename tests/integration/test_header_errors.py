"""A wrong request header is refused by every route and method that needs a key, with the limits in the headers."""

from __future__ import annotations

from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.account_service_pb2 import GetAccountRequest, ListUsageRequest, SumUsageRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import GetModelRequest, ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from tests.calls import as_dict, bearer, failure, upload_messages
from tests.conftest import Keys

MEDIA = "media/" + "0" * 26

WRONG = {"X-Request-Timeout": "soon", "Idempotency-Key": "two words"}


@pytest.fixture(params=["rest_url", "gateway_url"])
def base_url(request: pytest.FixtureRequest) -> str:
    """The base URL of REST in the app's own process, and of a gateway in front of it."""
    url: str = request.getfixturevalue(request.param)
    return url


@pytest.mark.parametrize(
    "path", ["api/v1/models", "api/v1/models/gpt-4", "api/v1/account", "api/v1/usage", MEDIA]
)
@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_header_is_refused_by_every_rest_route(
    http: aiohttp.ClientSession, base_url: str, keys: Keys, path: str, name: str
) -> None:
    headers = {"Authorization": f"Bearer {keys.test}", name: WRONG[name]}
    async with http.get(f"{base_url}/{path}", headers=headers) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["code"] == "invalid_parameter"
    assert name in error["message"]
    assert "X-Credits-Remaining" in response.headers


@pytest.mark.parametrize(
    "task", ["{", '{"model": "gpt-4", "temperature": "hot"}', '{"model": "nothing"}', "a form with a file"]
)
async def test_a_wrong_header_takes_precedence_over_a_wrong_body_and_a_file(
    http: aiohttp.ClientSession, base_url: str, keys: Keys, task: str
) -> None:
    headers = {"Authorization": f"Bearer {keys.test}", "Idempotency-Key": "two words"}
    data: str | aiohttp.FormData = task
    if task.startswith("{"):
        headers["Content-Type"] = "application/json"
    else:
        data = aiohttp.FormData({"model": "eleven-scribe"})
        data.add_field("audio", b"ID3", filename="a.mp3", content_type="audio/mpeg")
    async with http.post(f"{base_url}/api/v1/task", data=data, headers=headers) as response:
        assert response.status == 400
        assert "Idempotency-Key" in (await response.json())["error"]["message"]


METHODS: dict[str, Any] = {
    "ListModels": lambda channel, **call: ModelServiceStub(channel).ListModels(ListModelsRequest(), **call),
    "GetModel": lambda channel, **call: ModelServiceStub(channel).GetModel(
        GetModelRequest(id="gpt-4"), **call
    ),
    "GetAccount": lambda channel, **call: AccountServiceStub(channel).GetAccount(GetAccountRequest(), **call),
    "ListUsage": lambda channel, **call: AccountServiceStub(channel).ListUsage(ListUsageRequest(), **call),
    "SumUsage": lambda channel, **call: AccountServiceStub(channel).SumUsage(SumUsageRequest(), **call),
    "DownloadMedia": lambda channel, **call: MediaServiceStub(channel).DownloadMedia(
        DownloadMediaRequest(id="med_none"), **call
    ),
    "UploadMedia": lambda channel, **call: MediaServiceStub(channel).UploadMedia(
        iter(upload_messages(b"ID3", "audio/mpeg")), **call
    ),
}


@pytest.mark.parametrize("method", METHODS)
async def test_wrong_metadata_is_refused_by_every_grpc_method(
    channel: grpc.aio.Channel, keys: Keys, method: str
) -> None:
    metadata = bearer(keys.test, idempotency_key="two words")
    error = await failure(METHODS[method](channel, metadata=metadata))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Idempotency-Key" in (error.details() or "")
    assert "x-credits-remaining" in as_dict(error.trailing_metadata())


async def test_white_space_around_metadata_is_ignored_as_around_headers_of_rest(
    http: aiohttp.ClientSession, channel: grpc.aio.Channel, base_url: str, keys: Keys
) -> None:
    headers = {
        "Authorization": f"  Bearer {keys.test} ",
        "Idempotency-Key": " key ",
        "X-Request-Id": " mine ",
    }
    async with http.get(f"{base_url}/api/v1/account", headers=headers) as response:
        assert response.status == 200
        assert response.headers["X-Request-Id"] == "mine"
    metadata = tuple((name.lower(), value) for name, value in headers.items())
    call = METHODS["GetAccount"](channel, metadata=metadata)
    await call
    assert as_dict(await call.trailing_metadata())["x-request-id"] == "mine"
