"""Requests that are sent twice: what makes two of them the same, and the answer that is kept for the second.

The engine calls it for tasks with an Idempotency-Key. Kept is the result without its bytes; a picture or a
sound stays in the media store for as long as the answer, whether the caller wanted a link or not.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator

from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import GeneratedImage
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.speech_pb2 import SpeechOutput
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse, TaskStarted
from pomelo.media.store import MediaStore
from pomelo.providers.base import AudioSource
from pomelo.providers.chunks import MAX_AUDIO_BYTES, split_text
from pomelo.stores.ledger import REPLAY_SECONDS, IdempotencyKey
from pomelo.tasks.base import max_inline

MEDIA_GRACE_SECONDS = 60.0
"""Seconds that a medium outlives the answer that it belongs to, which is settled a little later."""


async def idempotency_key(key: str, task: Task, audio: AudioSource | None) -> IdempotencyKey:
    """A task with an Idempotency-Key, as a store keeps it: of the key itself only a digest stays.

    Raises:
        PomeloError: store_unavailable.
    """
    return IdempotencyKey(hashlib.sha256(key.encode()).hexdigest(), await fingerprint(task, audio))


async def fingerprint(task: Task, audio: AudioSource | None) -> bytes:
    """A digest that is equal for equal requests, over either wire: of a sound its bytes count, however they
    came. How the answer is to come back (streamed, raw, as a link) does not count: it is the same one.

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
    """What to keep of a result. Takes the links out of it that the caller did not ask for.

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
) -> TaskResult:
    """The result of a kept answer, with fresh links, and with its bytes where they go back within it.

    Raises:
        PomeloError: store_unavailable; a medium of it is gone.
    """
    result = TaskResult.FromString(answer)
    for part in _media(result):
        try:
            path, medium = media.find(part.media.media_id, owner)
            part.media.CopyFrom(medium)
            # The bytes of a sound that is streamed ride in its chunks.
            most = max_inline(wanted, stream=stream)
            inline = medium.size_bytes <= most and not (stream and result.HasField("speech"))
            if inline:
                part.data = path.read_bytes()
        except (OSError, PomeloError) as error:
            raise PomeloError("store_unavailable", "The stored answer's medium is gone") from error
        if wanted == ResponseFormat.RESPONSE_FORMAT_B64_JSON and (inline or stream):
            part.ClearField("media")
    return result


def replay_events(
    answer: bytes, result: TaskResult, owner: str, media: MediaStore
) -> Iterator[StreamTaskResponse]:
    """The events of a stream that gives a kept answer: `result` is what `again` made of it.

    Raises:
        PomeloError: store_unavailable.
    """
    started = TaskStarted(id=result.id, model=result.model, adjustments=result.adjustments)
    started.created.CopyFrom(result.created)
    yield StreamTaskResponse(started=started)
    if result.HasField("text"):
        if result.text.content:
            event = StreamTaskResponse()
            event.text_delta.content = result.text.content
            yield from split_text(event)
        last = StreamTaskResponse()
        last.text_delta.finish_reason = result.text.finish_reason
        last.text_delta.usage.CopyFrom(result.text.usage)
        yield last
        return
    if result.HasField("speech"):
        media_id = TaskResult.FromString(answer).speech.media.media_id
        content_type = result.speech.content_type
        path, _ = media.find(media_id, owner)
        try:
            with path.open("rb") as file:
                while piece := file.read(MAX_AUDIO_BYTES):
                    event = StreamTaskResponse()
                    event.audio_chunk.data = piece
                    event.audio_chunk.content_type = content_type
                    content_type = ""
                    yield event
        except OSError as error:
            raise PomeloError("store_unavailable") from error
    yield StreamTaskResponse(result=result)


def _media(result: TaskResult) -> list[GeneratedImage | SpeechOutput]:
    """The parts of a result that are media."""
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
