"""An upload over a channel: pieces go out until all are sent, or until the server has answered.

Called by `pomelo.server.remote`. It knows what grpc.aio makes of an answer that comes before the upload is
complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc

from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest

_PIECE = 512 * 1024

FAILED_WRITE = "Internal error from Core"
"""grpc.aio's own words; see `send`."""


async def send(rpc: Any, content_type: str, chunks: AsyncIterator[bytes]) -> list[Any]:
    """Sends an upload until it is complete or the server has answered.

    Gives the ends of the call (AioRpcErrors) in the order in which they were met: when a write fails after
    the server has answered, grpc.aio puts an end of its own in the place of the server's.
    """
    ends: list[Any] = []
    sending = asyncio.timeout(None)
    active = True

    def ended(_: Any) -> None:
        ends.append(_end(rpc))
        if active and len(ends) == 1:
            sending.reschedule(0)  # stops the wait for the next chunk

    try:
        async with sending:
            rpc.add_done_callback(ended)
            await rpc.write(UploadMediaRequest(content_type=content_type))
            async for chunk in chunks:
                for at in range(0, len(chunk), _PIECE):
                    await rpc.write(UploadMediaRequest(chunk=chunk[at : at + _PIECE]))
            await rpc.done_writing()
    except TimeoutError:
        if not sending.expired():
            raise
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        if not ends:
            raise
    finally:
        active = False
    return ends


def _end(rpc: Any) -> Any:
    """The end of a call that is done, as it is now."""
    return grpc.aio.AioRpcError(
        _now(rpc.code()), _now(rpc.initial_metadata()), _now(rpc.trailing_metadata()), _now(rpc.details())
    )


def _now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise RuntimeError("it had to wait")
