"""Media of tasks on several machines: files that a task reads are fetched, those that it makes are shared.

It is not needed if the media store is the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from pomelo.call import Call
from pomelo.engine.idempotency import MEDIA_GRACE_SECONDS, media_outputs
from pomelo.engine.job import AcceptedJob
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.media.store import MediaStore
from pomelo.stores.ledger import REPLAY_SECONDS
from pomelo.tasks.base import MAX_INLINE_FALLBACK


async def fetch_files(
    files: Callable[[Any], Iterable[str]],
    task_input: Any,
    limit: int,
    owner: str,
    media: MediaStore,
    call: Call,
) -> None:
    """Fetches the files of an input, in its order, up to and including the first that its check refuses: one
    that does not exist, or with which they have more than `limit` bytes.

    Raises:
        PomeloError: store_unavailable.
    """
    size = 0
    for media_id in dict.fromkeys(await asyncio.to_thread(list, files(task_input))):
        await media.fetch(media_id, owner, call)
        try:
            size += media.find(media_id, owner)[1].size_bytes
        except PomeloError:
            break
        if size > limit:
            break


async def fetch_answer(answer: bytes, owner: str, media: MediaStore, call: Call) -> None:
    """Fetches the media of a stored answer.

    Raises:
        PomeloError: store_unavailable.
    """
    for output in media_outputs(TaskResult.FromString(answer)):
        await media.fetch(output.media.id, owner, call)


async def share_output(result: TaskResult, accepted: AcceptedJob, media: MediaStore) -> None:
    """Lets every machine read the media of a result. If that fails, the result has no link, and contains the
    media inline unless a stream has delivered them.

    Raises:
        PomeloError: store_unavailable; they are too large to be inline, or kept for an Idempotency-Key.
    """
    owner, kept = accepted.principal.owner, accepted.idempotency_key is not None
    delivered = accepted.job.stream and result.HasField("speech")
    for output in media_outputs(result):
        if not output.HasField("media"):
            continue
        media_id, size = output.media.id, output.media.size_bytes
        try:
            await media.share(media_id, owner, REPLAY_SECONDS + MEDIA_GRACE_SECONDS if kept else None)
        except PomeloError:
            try:
                if kept or (size > MAX_INLINE_FALLBACK and not delivered):
                    raise
                if not delivered:
                    output.data = await asyncio.to_thread(media.find(media_id, owner)[0].read_bytes)
                output.ClearField("media")
            finally:
                media.discard(media_id, owner)
