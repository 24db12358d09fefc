"""pomelo.admin.v1.AdminService on both ends of the operator's unix socket: the handlers and the client."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import grpc
from google.protobuf.message_factory import GetMessageClass

from pomelo.gen.admin.v1.admin_service_pb2 import DESCRIPTOR
from pomelo.gen.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.server.calls import FrontEnd
from pomelo.server.messages import check_request, parse
from pomelo.server.remote.channel import TRANSLATED_ERRORS, open_channel
from pomelo.service import Operator

ADMIN_SERVICE = DESCRIPTOR.services_by_name["AdminService"]


def admin_handlers(operator: Operator) -> dict[str, Any]:
    """Returns grpc handlers of the methods of AdminService, by their names in the contract. They need no key
    and apply no limits: serve them only where only the operator can reach them."""
    front_end = FrontEnd()
    return {
        method.name: grpc.unary_unary_rpc_method_handler(
            front_end.unlimited(
                _checked(getattr(operator, _attribute(method.name)), GetMessageClass(method.input_type))
            ),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in ADMIN_SERVICE.methods
    }


def _checked(method: Callable[[Any], Awaitable[Any]], message_type: Any) -> Callable[[bytes], Awaitable[Any]]:
    """Returns a method that takes a serialized request, and refuses what is not one, and unknown fields."""

    async def call(data: bytes) -> Any:
        return await method(check_request(parse(data, message_type)))

    return call


def _remote(method: Any, timeout: float) -> Callable[[Any], Awaitable[Any]]:
    async def call(request: Any) -> Any:
        with TRANSLATED_ERRORS:
            return await method(request, timeout=timeout)

    return call


def _attribute(method: str) -> str:
    """Returns the name in `Operator` of a method of the contract: create_key for CreateKey."""
    return re.sub("(?<=.)(?=[A-Z])", "_", method).lower()


def socket_address(path: Path) -> str:
    """Returns grpc's address of the unix socket at `path`."""
    return f"unix:{quote(str(path.absolute()))}"


@asynccontextmanager
async def open_operator(path: Path, seconds: float) -> AsyncIterator[Operator]:
    """Yields the operator of the server that listens on the unix socket at `path`; implements
    `pomelo.service.Operator` over a channel.

    Its methods also raise server_unavailable (no server responds) and deadline_exceeded (after `seconds`).
    """
    async with open_channel(socket_address(path)) as channel:
        stub = AdminServiceStub(channel)
        methods = {
            _attribute(method.name): _remote(getattr(stub, method.name), seconds)
            for method in ADMIN_SERVICE.methods
        }
        yield cast("Operator", SimpleNamespace(**methods))
