"""pomelo.v1.AdminService on both ends of the operator's unix socket: the handlers and the client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf.message_factory import GetMessageClass

from pomelo.gen.v1.admin_service_pb2 import DESCRIPTOR
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.server.calls import FrontEnd
from pomelo.server.remote.channel import CHANNEL_OPTIONS
from pomelo.service import Operator
from pomelo.status import from_rpc_error

ADMIN_SERVICE = DESCRIPTOR.services_by_name["AdminService"]


def admin_handlers(operator: Operator) -> dict[str, Any]:
    """Returns grpc handlers of the methods of AdminService, by their names in the contract. They need no key
    and apply no limits: serve them only where nobody but the operator can reach them."""
    methods: dict[str, Callable[[Any], Awaitable[Any]]] = {
        "CreateKey": operator.create_key,
        "ListKeys": operator.list_keys,
        "RotateKey": operator.rotate_key,
        "RevokeKey": operator.revoke_key,
        "CreateAccount": operator.create_account,
        "ListAccounts": operator.list_accounts,
        "ShowAccount": operator.show_account,
        "GrantCredits": operator.grant_credits,
        "SetPlan": operator.set_plan,
        "QueryUsage": operator.query_usage,
        "Audit": operator.audit,
    }
    front_end = FrontEnd()
    return {
        method.name: grpc.unary_unary_rpc_method_handler(
            front_end.unlimited(methods[method.name]),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in ADMIN_SERVICE.methods
    }


class RemoteOperator:
    """Implements `pomelo.service.Operator` over a channel. A response may take `timeout` seconds."""

    def __init__(self, channel: Any, timeout: float) -> None:
        stub = AdminServiceStub(channel)

        def remote(method: Any) -> Any:
            async def call(request: Any) -> Any:
                try:
                    return await method(request, timeout=timeout)
                except grpc.aio.AioRpcError as error:
                    raise from_rpc_error(error) from error

            return call

        self.create_key = remote(stub.CreateKey)
        self.list_keys = remote(stub.ListKeys)
        self.rotate_key = remote(stub.RotateKey)
        self.revoke_key = remote(stub.RevokeKey)
        self.create_account = remote(stub.CreateAccount)
        self.list_accounts = remote(stub.ListAccounts)
        self.show_account = remote(stub.ShowAccount)
        self.grant_credits = remote(stub.GrantCredits)
        self.set_plan = remote(stub.SetPlan)
        self.query_usage = remote(stub.QueryUsage)
        self.audit = remote(stub.Audit)


def socket_address(path: Path) -> str:
    """Returns grpc's address of the unix socket at `path`."""
    return f"unix:{quote(str(path.absolute()))}"


@asynccontextmanager
async def open_operator(path: Path, seconds: float) -> AsyncIterator[Operator]:
    """Yields the operator of the server that listens on the unix socket at `path`.

    Its methods also raise server_unavailable (no server responds) and deadline_exceeded (after `seconds`).
    """
    async with grpc.aio.insecure_channel(socket_address(path), options=CHANNEL_OPTIONS) as channel:
        yield RemoteOperator(channel, seconds)
