"""The operator's socket: who can open it, and which files it replaces."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from pomelo.accounts.operator import LocalOperator
from pomelo.accounts.plans import BUILTIN
from pomelo.accounts.usage import UsageReader
from pomelo.app import App
from pomelo.gen.admin.v1.admin_service_pb2 import ListKeysRequest
from pomelo.gen.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.server.call_limits import CallLimits
from pomelo.server.calls import FrontEnd
from pomelo.server.server import open_operator_socket
from tests.calls import failure, reason_of
from tests.conftest import Keys


@pytest.fixture
def operator(app: App) -> LocalOperator:
    usage = UsageReader(app.store, b"s" * 32)
    return LocalOperator(app.store, app.keyring, BUILTIN, usage, ())


@pytest.fixture
def free_umask() -> Iterator[None]:
    """Sets a umask that leaves files open to everybody."""
    before = os.umask(0)
    yield
    os.umask(before)


async def listed(path: Path) -> int:
    """Returns the number of keys that a client of the socket can list."""
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        return len((await AdminServiceStub(channel).ListKeys(ListKeysRequest())).keys)


@pytest.mark.usefixtures("free_umask")
async def test_only_the_owner_can_open_the_operator_s_socket(
    operator: LocalOperator, keys: Keys, folder: Path
) -> None:
    path = folder / "admin.sock"
    async with open_operator_socket(operator, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await listed(path) >= 5
    assert not path.exists()
    assert os.umask(0) == 0, "the umask of the process is what it was"


async def test_the_socket_describes_the_operator_s_service_and_the_files_that_it_imports(
    operator: LocalOperator, folder: Path
) -> None:
    name = "pomelo.admin.v1.AdminService"
    requests = (
        ServerReflectionRequest(list_services=""),
        ServerReflectionRequest(file_containing_symbol=name),
    )
    async with (
        open_operator_socket(operator, folder / "admin.sock"),
        grpc.aio.insecure_channel(f"unix:{folder / 'admin.sock'}") as channel,
    ):
        call = ServerReflectionStub(channel).ServerReflectionInfo(iter(requests))
        services, files = [response async for response in call]
    assert name in {service.name for service in services.list_services_response.service}
    found = {
        FileDescriptorProto.FromString(file).name
        for file in files.file_descriptor_response.file_descriptor_proto
    }
    assert found >= {"pomelo/admin/v1/admin_service.proto", "pomelo/v1/account_service.proto"}


async def test_a_message_that_the_operator_s_service_can_not_decode_is_refused(
    operator: LocalOperator, folder: Path
) -> None:
    async with (
        open_operator_socket(operator, folder / "admin.sock"),
        grpc.aio.insecure_channel(f"unix:{folder / 'admin.sock'}") as channel,
    ):
        call = channel.unary_unary("/pomelo.admin.v1.AdminService/ListKeys")
        error = await failure(call(b"\xff\xff"))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_body")


async def test_the_operator_s_service_is_not_on_the_public_port(channel: grpc.aio.Channel) -> None:
    error = await failure(AdminServiceStub(channel).ListKeys(ListKeysRequest()))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_the_public_port_describes_the_details_of_errors_but_not_the_operator_s_service(
    channel: grpc.aio.Channel,
) -> None:
    requests = [
        ServerReflectionRequest(file_containing_symbol="google.rpc.ErrorInfo"),
        ServerReflectionRequest(file_containing_symbol="pomelo.v1.MediaService"),
        ServerReflectionRequest(file_containing_symbol="pomelo.admin.v1.AdminService"),
        ServerReflectionRequest(file_by_filename="pomelo/admin/v1/admin_service.proto"),
    ]
    call = ServerReflectionStub(channel).ServerReflectionInfo(iter(requests))
    errors = [response.error_response.error_code async for response in call]
    not_found = grpc.StatusCode.NOT_FOUND.value[0]
    assert errors == [0, 0, not_found, not_found]


async def test_reflection_finds_the_file_of_a_method(channel: grpc.aio.Channel) -> None:
    requests = [
        ServerReflectionRequest(host="h", file_containing_symbol=f"pomelo.v1.TaskService{method}")
        for method in ("", ".RunTask", ".Nothing", ".")
    ]
    call = ServerReflectionStub(channel).ServerReflectionInfo(iter(requests))
    service, method, *others = [response async for response in call]
    assert method.file_descriptor_response == service.file_descriptor_response
    assert method.original_request == requests[1]
    assert [other.error_response.error_code for other in others] == [grpc.StatusCode.NOT_FOUND.value[0]] * 2


async def test_a_socket_of_a_dead_process_is_replaced(operator: LocalOperator, folder: Path) -> None:
    path = folder / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    async with open_operator_socket(operator, path):
        assert await listed(path) >= 0


async def test_a_socket_in_use_is_not_replaced(operator: LocalOperator, folder: Path) -> None:
    path = folder / "admin.sock"
    async with open_operator_socket(operator, path):
        with pytest.raises(OSError, match="listens on"):
            async with open_operator_socket(operator, path):
                pass
        assert await listed(path) >= 0


async def test_a_file_that_is_not_a_socket_is_never_removed(operator: LocalOperator, folder: Path) -> None:
    path = folder / "admin.sock"
    path.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        async with open_operator_socket(operator, path):
            pass
    assert path.read_text() == "precious"


async def test_a_call_of_the_operator_may_take_longer_than_a_call_without_a_key() -> None:
    async def answer_late(request: bytes) -> bytes:
        await asyncio.sleep(0.4)
        return request

    front_end = FrontEnd(limits=CallLimits(unauthenticated_time=0.1))
    handler = grpc.unary_unary_rpc_method_handler(front_end.unlimited(answer_late))
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Late", {"Say": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await channel.unary_unary("/test.Late/Say")(b"hello") == b"hello"
    await server.stop(None)
