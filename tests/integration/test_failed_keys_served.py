"""The limit of failed keys of an address over both protocols: the 21st in a minute is refused, valid keys are not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import App, open_app
from pomelo.configuration.front_ends import gateway_proof
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.network.addresses import join_address
from pomelo.network.origin import GatewayProof
from pomelo.server.remote import open_remote
from pomelo.service import list_all_models
from pomelo.settings import Settings
from tests.calls import bearer, call_of, details_of, failure, reason_of
from tests.rest_driver import RestDriver


@pytest.fixture
async def fresh_app(tmp_path: Path) -> AsyncIterator[App]:
    """An app that has received no invalid key yet."""
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data", grace=0.5)
    async with open_app(settings) as app:
        yield app


async def by_grpc(app: App, key: str) -> grpc.aio.AioRpcError | None:
    """Lists the models with a key; returns the error, or None."""
    assert app.grpc is not None
    async with grpc.aio.insecure_channel(app.grpc) as channel:
        try:
            await ModelServiceStub(channel).ListModels(ListModelsRequest(), metadata=bearer(key))
        except grpc.aio.AioRpcError as error:
            return error
    return None


async def test_both_protocols_share_the_limit_of_an_address(
    fresh_app: App, http: aiohttp.ClientSession
) -> None:
    assert fresh_app.rest is not None
    rest = RestDriver(http, "http://{}:{}".format(*fresh_app.rest))
    _, good = await fresh_app.keyring.create()
    for _ in range(10):
        refused = await rest.get("/api/v1/models", "pml_test_bad")
        assert (refused.status, refused.code) == (401, "invalid_api_key")
        error = await by_grpc(fresh_app, "pml_test_bad")
        assert error is not None
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    limited = await rest.get("/api/v1/models", "pml_test_bad")
    assert (limited.status, limited.code) == (429, "rate_limit_exceeded")
    assert limited.retry_after is not None
    assert 1 <= limited.retry_after <= 60
    error = await by_grpc(fresh_app, "pml_test_bad")
    assert error is not None
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(error) == "rate_limit_exceeded"
    (violation,) = details_of(error)["QuotaFailure"].violations
    assert (violation.subject, violation.quota_id) == ("address", "failed_keys_per_minute")
    assert (violation.quota_metric, violation.quota_value) == ("failed_keys", 0)
    allowed = await rest.get("/api/v1/models", good)
    assert (allowed.status, allowed.code) == (200, "ok")
    assert await by_grpc(fresh_app, good) is None


@pytest.mark.parametrize(("proxies", "separate"), [(("127.0.0.0/8", "::1"), True), ((), False)])
async def test_failed_keys_behind_a_trusted_proxy_count_by_the_address_that_it_reports(
    tmp_path: Path, http: aiohttp.ClientSession, proxies: tuple[str, ...], separate: bool
) -> None:
    settings = Settings(
        rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data", grace=0.5, trusted_proxies=proxies
    )
    async with open_app(settings) as app, AsyncExitStack() as stack:
        assert app.rest is not None
        assert app.grpc is not None
        url = f"http://{join_address(*app.rest)}/api/v1/models"
        stub = ModelServiceStub(await stack.enter_async_context(grpc.aio.insecure_channel(app.grpc)))

        async def by_rest(forwarded: str) -> int:
            headers = {"Authorization": "Bearer bad", "X-Forwarded-For": forwarded}
            async with http.get(url, headers=headers) as response:
                return response.status

        async def by_grpc(forwarded: str) -> str:
            metadata = bearer("bad", x_forwarded_for=forwarded)
            return reason_of(await failure(stub.ListModels(ListModelsRequest(), metadata=metadata)))

        for number in range(10):
            assert await by_rest(f"10.0.0.{number}, 203.0.113.7, 127.0.0.2") == 401
            assert await by_grpc(f"10.0.0.{number}, 203.0.113.7") == "invalid_api_key"
        assert await by_rest("203.0.113.7") == 429
        assert await by_grpc("203.0.113.7") == "rate_limit_exceeded"
        assert await by_rest("203.0.113.7:4711, 127.0.0.2:80") == 429
        assert await by_grpc("203.0.113.7:4711") == "rate_limit_exceeded"
        assert await by_rest("203.0.113.8") == (401 if separate else 429)
        assert await by_grpc("203.0.113.9") == ("invalid_api_key" if separate else "rate_limit_exceeded")


async def code_of(remote: Any, key: str, address: str) -> str:
    """Returns the error code of a call through a gateway, whose caller has an address."""
    call = call_of(key)
    call.address = address
    with pytest.raises(PomeloError) as caught:
        await list_all_models(remote.models, call)
    return caught.value.code


async def test_failed_keys_through_a_trusted_gateway_count_by_the_callers_address(fresh_app: App) -> None:
    assert fresh_app.grpc is not None
    proof = gateway_proof(fresh_app.settings.root_secret())
    async with open_remote(fresh_app.grpc, proof=proof) as remote:
        assert {await code_of(remote, "bad", "203.0.113.1") for _ in range(20)} == {"invalid_api_key"}
        assert await code_of(remote, "bad", "203.0.113.1") == "rate_limit_exceeded"
        assert await code_of(remote, "bad", "203.0.113.2") == "invalid_api_key"


async def test_an_untrusted_gateway_cannot_choose_the_address_that_is_counted(fresh_app: App) -> None:
    assert fresh_app.grpc is not None
    _, good = await fresh_app.keyring.create()
    for proof in (None, GatewayProof(b"another secret" * 4)):
        async with open_remote(fresh_app.grpc, proof=proof) as remote:
            codes = [await code_of(remote, "bad", f"203.0.113.{number}") for number in range(25)]
            assert codes[20:] == ["rate_limit_exceeded"] * 5
            assert await list_all_models(remote.models, call_of(good))
