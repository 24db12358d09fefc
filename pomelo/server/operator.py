"""pomelo.v1.AdminService on both ends of the operator's unix socket: the servicer and the client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import grpc

from pomelo.gen.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceServicer, AdminServiceStub
from pomelo.server.calls import unlimited
from pomelo.server.remote.channel import CHANNEL_OPTIONS
from pomelo.server.rpc import Rpc
from pomelo.service import Operator
from pomelo.status import from_rpc_error

T = TypeVar("T")


class AdminServicer(AdminServiceServicer):
    """Answers AdminService with the methods of an `Operator`."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    @unlimited
    async def CreateKey(self, request: pb.CreateKeyRequest, rpc: Rpc) -> pb.CreateKeyResponse:
        return await self._operator.create_key(request)

    @unlimited
    async def ListKeys(self, request: pb.ListKeysRequest, rpc: Rpc) -> pb.ListKeysResponse:
        return await self._operator.list_keys(request)

    @unlimited
    async def RotateKey(self, request: pb.RotateKeyRequest, rpc: Rpc) -> pb.RotateKeyResponse:
        return await self._operator.rotate_key(request)

    @unlimited
    async def RevokeKey(self, request: pb.RevokeKeyRequest, rpc: Rpc) -> pb.RevokeKeyResponse:
        return await self._operator.revoke_key(request)

    @unlimited
    async def CreateAccount(self, request: pb.CreateAccountRequest, rpc: Rpc) -> pb.CreateAccountResponse:
        return await self._operator.create_account(request)

    @unlimited
    async def ListAccounts(self, request: pb.ListAccountsRequest, rpc: Rpc) -> pb.ListAccountsResponse:
        return await self._operator.list_accounts(request)

    @unlimited
    async def ShowAccount(self, request: pb.ShowAccountRequest, rpc: Rpc) -> pb.ShowAccountResponse:
        return await self._operator.show_account(request)

    @unlimited
    async def GrantCredits(self, request: pb.GrantCreditsRequest, rpc: Rpc) -> pb.GrantCreditsResponse:
        return await self._operator.grant_credits(request)

    @unlimited
    async def SetPlan(self, request: pb.SetPlanRequest, rpc: Rpc) -> pb.SetPlanResponse:
        return await self._operator.set_plan(request)

    @unlimited
    async def QueryUsage(self, request: pb.QueryUsageRequest, rpc: Rpc) -> pb.QueryUsageResponse:
        return await self._operator.query_usage(request)

    @unlimited
    async def Audit(self, request: pb.AuditRequest, rpc: Rpc) -> pb.AuditResponse:
        return await self._operator.audit(request)


class RemoteOperator:
    """Implements `pomelo.service.Operator` over a channel. An answer may take `timeout` seconds."""

    def __init__(self, channel: Any, timeout: float) -> None:
        self._stub = AdminServiceStub(channel)
        self._timeout = timeout

    async def _call(self, method: Callable[..., Awaitable[T]], request: Any) -> T:
        try:
            return await method(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def create_key(self, request: pb.CreateKeyRequest) -> pb.CreateKeyResponse:
        return await self._call(self._stub.CreateKey, request)

    async def list_keys(self, request: pb.ListKeysRequest) -> pb.ListKeysResponse:
        return await self._call(self._stub.ListKeys, request)

    async def rotate_key(self, request: pb.RotateKeyRequest) -> pb.RotateKeyResponse:
        return await self._call(self._stub.RotateKey, request)

    async def revoke_key(self, request: pb.RevokeKeyRequest) -> pb.RevokeKeyResponse:
        return await self._call(self._stub.RevokeKey, request)

    async def create_account(self, request: pb.CreateAccountRequest) -> pb.CreateAccountResponse:
        return await self._call(self._stub.CreateAccount, request)

    async def list_accounts(self, request: pb.ListAccountsRequest) -> pb.ListAccountsResponse:
        return await self._call(self._stub.ListAccounts, request)

    async def show_account(self, request: pb.ShowAccountRequest) -> pb.ShowAccountResponse:
        return await self._call(self._stub.ShowAccount, request)

    async def grant_credits(self, request: pb.GrantCreditsRequest) -> pb.GrantCreditsResponse:
        return await self._call(self._stub.GrantCredits, request)

    async def set_plan(self, request: pb.SetPlanRequest) -> pb.SetPlanResponse:
        return await self._call(self._stub.SetPlan, request)

    async def query_usage(self, request: pb.QueryUsageRequest) -> pb.QueryUsageResponse:
        return await self._call(self._stub.QueryUsage, request)

    async def audit(self, request: pb.AuditRequest) -> pb.AuditResponse:
        return await self._call(self._stub.Audit, request)


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
