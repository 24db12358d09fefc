"""Each method passes its request to its service and returns the answer, and refuses unknown fields."""

from __future__ import annotations

from typing import Any

import pytest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from pomelo.call import Call
from pomelo.gen.v1 import account_service_pb2 as account_pb
from pomelo.gen.v1 import model_service_pb2 as model_pb
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.server.reflection import Reflection
from tests.calls import bearer, failure, reason_of
from tests.integration.scripted_services import KEY, ScriptedServices, serve_scripted

UNKNOWN = b"\xba\x3e\x01x"


class Recorder(ScriptedServices):
    """Services that record the requests that they get."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Any] = []

    async def list_models(self, request: Any, call: Call) -> Any:
        self.requests.append(request)
        return model_pb.ListModelsResponse(next_page_token="of models")

    async def get_account(self, call: Call) -> Any:
        self.requests.append(call.api_key)
        return account_pb.Account(id="acme")

    async def list_usage(self, request: Any, call: Call) -> Any:
        self.requests.append(request)
        return account_pb.ListUsageResponse(next_page_token="of records")

    async def sum_usage(self, request: Any, call: Call) -> Any:
        self.requests.append(request)
        return account_pb.SumUsageResponse(next_page_token="of sums")


CALLS: dict[str, tuple[Any, Any, Any]] = {
    "ListModels": (
        ModelServiceStub,
        model_pb.ListModelsRequest(page_size=3),
        model_pb.ListModelsResponse(next_page_token="of models"),
    ),
    "ListUsage": (
        AccountServiceStub,
        account_pb.ListUsageRequest(page_size=4),
        account_pb.ListUsageResponse(next_page_token="of records"),
    ),
    "SumUsage": (
        AccountServiceStub,
        account_pb.SumUsageRequest(page_token="x"),
        account_pb.SumUsageResponse(next_page_token="of sums"),
    ),
}


@pytest.mark.parametrize("method", CALLS)
async def test_a_method_passes_on_its_request_and_refuses_unknown_fields(method: str) -> None:
    stub, request, response = CALLS[method]
    services = Recorder()
    async with serve_scripted(services) as opened:
        call = getattr(stub(opened.channel), method)
        assert await call(request, metadata=bearer(KEY)) == response
        unknown = type(request).FromString(UNKNOWN)
        assert reason_of(await failure(call(unknown, metadata=bearer(KEY)))) == "invalid_parameter"
    assert services.requests == [request]


async def test_a_model_and_an_account_are_returned() -> None:
    services = Recorder()
    async with serve_scripted(services) as opened:
        account = await AccountServiceStub(opened.channel).GetAccount(
            account_pb.GetAccountRequest(), metadata=bearer(KEY)
        )
        model = await ModelServiceStub(opened.channel).GetModel(
            model_pb.GetModelRequest(id="m"), metadata=bearer(KEY)
        )
    assert (account.account.id, model.model.id, services.requests) == ("acme", "m", [KEY])


@pytest.mark.parametrize(
    "symbol",
    [
        *("pomelo.v1.TaskService", "pomelo.v1.TaskService.RunTask", "pomelo.v1.TaskSpec"),
        *("google.rpc.Status", "google.rpc.ErrorInfo"),
    ],
)
def test_reflection_describes_services_their_messages_and_the_details_of_errors(symbol: str) -> None:
    request = ServerReflectionRequest(file_containing_symbol=symbol)
    (answer,) = Reflection(["pomelo.v1.TaskService"]).answers(request)
    assert answer.file_descriptor_response.file_descriptor_proto
    assert answer.original_request == request
