"""Idempotency keys: which requests are the same, and the stored answer that a repeated request gets.

A stored answer has no media bytes; its image or audio stays in the media store for as long as the answer,
whether the caller wanted a link or not.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from pomelo.engine.job import AcceptedJob
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.image_pb2 import GeneratedImage
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.speech_pb2 import SpeechOutput
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse, TaskStarted
from pomelo.media.audio import AudioSource
from pomelo.media.store import MediaStore
from pomelo.stores.ledger import REPLAY_SECONDS, IdempotencyKey
from pomelo.tasks.base import max_inline

MEDIA_GRACE_SECONDS = 60.0
"""Seconds that a file outlives the answer that it belongs to, which is settled a little later."""


class ReplayedTask:
    """The stored answer to a request with a known Idempotency-Key, in the form in which it is requested now.

    Raises:
        PomeloError: store_unavailable; a file of it is gone.
    """

    def __init__(self, answer: bytes, accepted: AcceptedJob, media: MediaStore) -> None:
        self._accepted = accepted
        wanted, owner = requested_format(accepted.job.input), accepted.principal.owner
        self.result, self._file = restore_answer(answer, wanted, owner, media, stream=accepted.job.stream)

    def check_strict(self) -> None:
        """Refuses an answer whose input was adjusted.

        Raises:
            PomeloError: invalid_parameter.
        """
        if self.result.adjustments:
            raise invalid(
                self.result.adjustments[0].field,
                "left out or changed: the answer to repeat was made without it as given",
            )

    async def events(self) -> AsyncGenerator[StreamTaskResponse, None]:
        """The answer as a stream."""
        result = self.result
        started = TaskStarted(id=result.id, model=result.model, adjustments=result.adjustments)
        started.created.CopyFrom(result.created)
        yield StreamTaskResponse(started=started)
        for event in self._accepted.definition.replay(result, self._file):
            yield event


def requested_format(given: Any) -> ResponseFormat.ValueType:
    """The `response_format` of an input; unspecified for inputs without that field."""
    return getattr(given, "response_format", ResponseFormat.RESPONSE_FORMAT_UNSPECIFIED)


async def idempotency_key(key: str, task: Task, audio: AudioSource | None) -> IdempotencyKey:
    """An Idempotency-Key as a store keeps it: a digest of the key, and the fingerprint of its request.

    Raises:
        PomeloError: store_unavailable.
    """
    return IdempotencyKey(hashlib.sha256(key.encode()).hexdigest(), await fingerprint(task, audio))


async def fingerprint(task: Task, audio: AudioSource | None) -> bytes:
    """A digest that is equal for equal requests, over both protocols. The bytes of audio count, however they
    were sent; the form of the answer (streamed, raw, a link) does not.

    Raises:
        PomeloError: store_unavailable.
    """
    digest = hashlib.sha256()
    bare = Task()
    bare.CopyFrom(task)
    given = getattr(bare, bare.WhichOneof("input") or "text")
    if "response_format" in given.DESCRIPTOR.fields_by_name:
        given.ClearField("response_format")
    if audio is not None:
        given.ClearField("audio")
        digest.update(await asyncio.to_thread(_digest, audio))
    digest.update(bare.SerializeToString(deterministic=True))
    return digest.digest()


def store_answer(
    result: TaskResult, wanted: ResponseFormat.ValueType, media: MediaStore, *, stream: bool
) -> bytes:
    """The answer to store of a result. Removes the links from `result` that the caller did not ask for.

    Raises:
        PomeloError: store_unavailable.
    """
    answer = TaskResult()
    answer.CopyFrom(result)
    for part, shown in zip(_media(answer), _media(result), strict=True):
        media.keep(part.media.media_id, REPLAY_SECONDS + MEDIA_GRACE_SECONDS)
        part.ClearField("data")
        if wanted == ResponseFormat.RESPONSE_FORMAT_B64_JSON and (shown.data or stream):
            shown.ClearField("media")
    return answer.SerializeToString()


def restore_answer(
    answer: bytes, wanted: ResponseFormat.ValueType, owner: str, media: MediaStore, *, stream: bool
) -> tuple[TaskResult, Path | None]:
    """The result of a stored answer, with new links and with the bytes that are returned inline; and the file
    of its last media, None without media.

    Raises:
        PomeloError: store_unavailable; a file of it is gone.
    """
    result = TaskResult.FromString(answer)
    path = None
    for part in _media(result):
        try:
            path, stored = media.find(part.media.media_id, owner)
            part.media.CopyFrom(stored)
            # Streamed audio is returned in chunks.
            most = max_inline(wanted, stream=stream)
            inline = stored.size_bytes <= most and not (stream and result.HasField("speech"))
            if inline:
                part.data = path.read_bytes()
        except (OSError, PomeloError) as error:
            raise PomeloError("store_unavailable", "The stored answer's file is gone") from error
        if wanted == ResponseFormat.RESPONSE_FORMAT_B64_JSON and (inline or stream):
            part.ClearField("media")
    return result, path


def _media(result: TaskResult) -> list[GeneratedImage | SpeechOutput]:
    """The outputs of a result that have media."""
    if result.HasField("image"):
        return list(result.image.images)
    return [result.speech] if result.HasField("speech") else []


def _digest(audio: AudioSource) -> bytes:
    if audio.path is None:
        return hashlib.sha256(audio.data).digest()
    try:
        with audio.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise PomeloError("store_unavailable") from error
