"""Calls with an API key, and the errors that end them."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest

NAMED = re.compile(r"\d{4}-\d\d-\d\dT[\d:]+Z|\d[\d,]*\d|\d")
"""Times and numbers in a message."""


def bearer(key: str, **headers: str) -> list[tuple[str, str]]:
    """Returns the metadata of a call with a key; `_` in the name of a header stands for `-`."""
    return [("authorization", f"Bearer {key}"), *((k.replace("_", "-"), v) for k, v in headers.items())]


def call_of(key: str | None, timeout: float = 20.0, **headers: str) -> Call:
    """Returns a call as the REST gateway creates it; `_` in the name of a header stands for `-`."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        sent["authorization"] = f"Bearer {key}"
    call = Call.from_headers(sent.get, protocol="rest")
    call.deadline = time.monotonic() + timeout
    return call


def as_dict(metadata: Any) -> dict[str, str]:
    """Returns gRPC metadata as a dict."""
    return {str(key): str(value) for key, value in metadata or ()}


def details_of(error: Any) -> dict[str, Any]:
    """Returns the details of an AioRpcError, by the names of their types."""
    packed = dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
    return unpack(status_pb2.Status.FromString(packed))


def values_of(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """Returns the metadata of an error's ErrorInfo, which have every number and time that its message names."""
    values = dict(details_of(error)["ErrorInfo"].metadata)
    text = " ".join(value.replace(",", "") for value in values.values())
    for named in NAMED.findall(error.details() or ""):
        assert re.search(rf"(?<!\d){named.replace(',', '')}(?!\d)", text), named
    return values


def unpack(status: status_pb2.Status) -> dict[str, Any]:
    """Returns the details of a status, by the names of their types."""
    details = {}
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        assert packed.Unpack(detail)
        details[type(detail).__name__] = detail
    return details


def reason_of(error: Any) -> str:
    """Returns the code in the details of an AioRpcError; empty without one."""
    info = details_of(error).get("ErrorInfo")
    if info is None:
        return ""
    assert info.domain == "pomelo"
    return str(info.reason).lower()


def upload_messages(
    data: bytes, content_type: str | None = None, size: int = 65_536
) -> list[UploadMediaRequest]:
    """Returns the messages of an upload, with chunks of `size` bytes."""
    head = (
        []
        if content_type is None
        else [UploadMediaRequest(header=UploadMediaHeader(content_type=content_type))]
    )
    return head + [UploadMediaRequest(chunk=data[at : at + size]) for at in range(0, len(data), size)]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """Returns the error that ends a call; an assertion fails if the call succeeds."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end(call)
    return caught.value


async def refusal(awaitable: Awaitable[Any]) -> PomeloError:
    """Returns the PomeloError that an awaitable raises; the test fails if it raises none."""
    try:
        await awaitable
    except PomeloError as error:  # not pytest.raises, which keeps the error in a reference cycle
        return error
    pytest.fail("no PomeloError was raised")


def error_parts(
    error: PomeloError,
) -> tuple[str, str, str | None, int | None, frozenset[tuple[str, str]]]:
    """Returns all attributes of an error, to compare it."""
    return error.code, error.message, error.field, error.retry_after, frozenset(error.values.items())


async def end(call: Any) -> None:
    """Reads a unary or streaming call to its end."""
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call
