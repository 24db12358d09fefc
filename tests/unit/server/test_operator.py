"""The operator's service over a unix socket: each call reaches its method, and waits only so long."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from pomelo.gen.admin.v1 import admin_service_pb2 as admin_pb
from pomelo.server.operator import ADMIN_SERVICE, open_operator
from pomelo.server.server import open_operator_socket
from pomelo.service import Operator
from tests.unit.refusals import refused

METHODS = [method.name for method in ADMIN_SERVICE.methods]


def python_name(method: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower()


class Recorder:
    """An operator that records the calls; none returns before `answer` is set."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.called = asyncio.Event()
        self.answer = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        async def call(request: object) -> object:
            self.calls.append(name)
            self.called.set()
            await self.answer.wait()
            return getattr(admin_pb, type(request).__name__.replace("Request", "Response"))()

        return call


@pytest.fixture
async def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def path(recorder: Recorder) -> AsyncIterator[Path]:
    """A short path, as the system limits those of sockets, with characters that have a meaning in addresses."""
    with tempfile.TemporaryDirectory(prefix="a %41?") as folder:
        path = Path(folder, "operator.sock")
        async with open_operator_socket(cast(Operator, recorder), path, grace=0.0):
            yield path


@pytest.mark.parametrize("method", METHODS)
async def test_each_call_reaches_its_method(method: str, recorder: Recorder, path: Path) -> None:
    recorder.answer.set()
    async with open_operator(path, 10.0) as operator:
        request = getattr(admin_pb, f"{method}Request")()
        response = await getattr(operator, python_name(method))(request)
    assert type(response) is getattr(admin_pb, f"{method}Response")
    assert recorder.calls == [python_name(method)]


async def test_an_error_of_the_operator_reaches_the_client(
    recorder: Recorder, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "answer", None)  # so that each call fails unexpectedly
    async with open_operator(path, 10.0) as operator:
        with refused("internal_error"):
            await operator.audit_ledger(admin_pb.AuditLedgerRequest())
        unknown = admin_pb.AuditLedgerRequest.FromString(b"\xba\x3e\x01x")
        with refused("invalid_parameter"):
            await operator.audit_ledger(unknown)
    assert recorder.calls == ["audit_ledger"]


async def test_a_call_ends_after_the_seconds_of_its_client(recorder: Recorder, path: Path) -> None:
    async with open_operator(path, 0.2) as operator, asyncio.timeout(20):
        with refused("deadline_exceeded"):
            await operator.audit_ledger(admin_pb.AuditLedgerRequest())
    assert recorder.calls == ["audit_ledger"]


async def test_a_running_call_may_end_within_the_grace_of_the_socket(
    recorder: Recorder, tmp_path: Path
) -> None:
    path = tmp_path / "operator.sock"
    async with open_operator(path, 10.0) as operator:
        async with open_operator_socket(cast(Operator, recorder), path, grace=10.0):
            running = asyncio.ensure_future(operator.audit_ledger(admin_pb.AuditLedgerRequest()))
            async with asyncio.timeout(20):
                await recorder.called.wait()
            asyncio.get_running_loop().call_later(0.1, recorder.answer.set)
        assert await running == admin_pb.AuditLedgerResponse()


async def test_the_path_of_a_socket_may_have_107_bytes(recorder: Recorder) -> None:
    with tempfile.TemporaryDirectory() as folder:
        longest = Path(folder, "x" * (106 - len(folder)))
        async with open_operator_socket(cast(Operator, recorder), longest):
            pass
        with pytest.raises(OSError, match="shorter path"):
            async with open_operator_socket(cast(Operator, recorder), longest.with_name(longest.name + "x")):
                pytest.fail("it was opened")
