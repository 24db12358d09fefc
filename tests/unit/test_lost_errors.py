"""What counts as an error that Pomelo has lost, and what does not."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pomelo.runtime.process import resolve, stop
from tests.lost_errors import lost_errors
from tests.waiting import until


class LostError(Exception):
    pass


async def fail() -> None:
    raise LostError


async def fail_in_a_task_of_pomelo() -> None:
    failing = asyncio.create_task(fail())
    await asyncio.wait({failing})
    task = asyncio.create_task(stop(failing))
    await asyncio.wait({task})


async def fail_in_a_task_of_tests() -> None:
    await asyncio.wait({asyncio.create_task(fail())})


async def fail_in_a_callback_of_pomelo() -> None:
    wrong: Any = resolve
    asyncio.get_running_loop().call_soon(wrong, "no future", 1)
    await asyncio.sleep(0)


async def fail_a_future() -> None:
    asyncio.get_running_loop().create_future().set_exception(LostError())


async def fail_a_future_of_tests() -> None:
    future = asyncio.get_running_loop().create_future()
    try:
        raise LostError
    except LostError as error:
        future.set_exception(error)


@pytest.mark.parametrize(
    ("lose", "expected"),
    [
        (fail_in_a_task_of_pomelo, 1),
        (fail_in_a_task_of_tests, 0),
        (fail_in_a_callback_of_pomelo, 1),
        (fail_a_future, 1),
        (fail_a_future_of_tests, 0),
    ],
)
async def test_only_what_pomelo_loses_counts(
    lose: Callable[[], Coroutine[Any, Any, None]], expected: int
) -> None:
    with lost_errors() as found:
        await lose()
        gc.collect()
    assert len(found) == expected


async def test_the_future_of_a_stream_whose_connection_was_reset_is_never_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        protocol: Any = writer.transport.get_protocol()
        accepted, _ = listening.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    await until(protocol._closed.done)
    await asyncio.sleep(0)
    assert protocol._closed._log_traceback is False
    writer.close()
