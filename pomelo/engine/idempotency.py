"""Idempotency keys: which requests are the same, and the stored answer that a repeated request gets.

A stored answer has no media bytes; its image or audio stays in the media store for as long as the answer,
whether the caller wanted a link or not.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from pomelo.call import Call
from pomelo.engine.job import AcceptedJob
from pomelo.engine.results import started_event, write_usage
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.image_pb2 import GeneratedImage
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.speech_pb2 import SpeechOutput
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.media.audio import AudioSource, sample_format
from pomelo.media.store import MediaStore, no_such_media
from pomelo.runtime.in_flight import FairSemaphore
from pomelo.stores.ledger import REPLAY_SECONDS, IdempotencyKey, ReplayedAnswer
from pomelo.tasks.base import LARGE, max_inline

_ANSWER_FORM = b"2"
"""Part of every fingerprint. It changes with the messages of stored answers, so that an answer of another
form has another fingerprint, and is never read as one of this form."""

MEDIA_GRACE_SECONDS = 60.0
"""Seconds that a file outlives the answer that it belongs to, which is settled a little later."""

REPLAY_RATE = 32 * 1024 * 1024
"""Bytes of large replays that an account gets in a second."""


class ReplayQueue:
    """Queues the large replays of each account: one after the other, with pauses. They are free, and no limit
    applies to them, but each occupies the event loop while it is read and rendered."""

    def __init__(self) -> None:
        self._turns = FairSemaphore(1)

    async def turn(self, replayed: ReplayedAnswer, accepted: AcceptedJob) -> None:
        """Waits for the account's turn, if what is read of the answer is large: its text, and the media that
        it has inline. In a stream only images are."""
        record, account, stream = replayed.record, accepted.principal.account, accepted.job.stream
        size = len(replayed.answer)
        most = max_inline(accepted.delivery, stream=stream)
        if record.output_bytes <= most and (record.images or not stream):
            size = max(size, record.output_bytes)
        if size > LARGE:
            await self._turns.acquire(account)
            asyncio.get_running_loop().call_later(size / REPLAY_RATE, self._turns.release, account)


class ReplayedTask:
    """The stored answer to a request with a known Idempotency-Key, in the form in which it is requested now.
    What it has inline counts as buffered by its `call`: no limit of concurrent tasks applies to replays.

    Raises:
        PomeloError: store_unavailable; a file of it is gone. overloaded; its caller has too much to read.
    """

    def __init__(
        self, replayed: ReplayedAnswer, accepted: AcceptedJob, media: MediaStore, call: Call
    ) -> None:
        self._accepted = accepted
        self.result, self._file = restore_answer(
            replayed.answer,
            accepted.delivery,
            accepted.principal.owner,
            media,
            stream=accepted.job.stream,
            reserve=call.reserve,
        )
        write_usage(self.result, replayed.record)

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

    async def events(self) -> AsyncGenerator[TaskEvent, None]:
        yield started_event(self.result)
        for number, event in enumerate(self._accepted.definition.replay(self.result, self._file), 2):
            event.sequence_number = number
            yield event


async def idempotency_key(key: str, spec: TaskSpec, audio: AudioSource | None) -> IdempotencyKey:
    """An Idempotency-Key as a store keeps it: a digest of the key, and the fingerprint of its request.

    Raises:
        PomeloError: store_unavailable.
    """
    return IdempotencyKey(hashlib.sha256(key.encode()).hexdigest(), await fingerprint(spec, audio))


async def fingerprint(spec: TaskSpec, audio: AudioSource | None) -> bytes:
    """A digest that is equal for equal tasks, over both protocols. The bytes of audio count, however they
    were sent, and the media type of bare samples; the form of the answer (streamed, raw, a link) is not part
    of the task.

    Raises:
        PomeloError: store_unavailable.
    """
    if audio is None and spec.ByteSize() <= LARGE:
        return _fingerprint(spec, None)
    return await asyncio.to_thread(_fingerprint, spec, audio)


def _fingerprint(spec: TaskSpec, audio: AudioSource | None) -> bytes:
    digest = hashlib.sha256(_ANSWER_FORM)
    if audio is not None:
        digest.update(_digest(audio))
        if sample_format(audio.content_type) is not None:  # it says how long they are, and how they sound
            digest.update(audio.content_type.encode())
        without_audio = TaskSpec()
        without_audio.CopyFrom(spec)
        getattr(without_audio, without_audio.WhichOneof("input") or "text").ClearField("audio")
        spec = without_audio
    digest.update(spec.SerializeToString(deterministic=True))
    return digest.digest()


def store_answer(
    result: TaskResult, delivery: MediaDelivery.ValueType, media: MediaStore, *, stream: bool
) -> bytes:
    """The answer to store of a result. Removes the links from `result` that the caller did not ask for.

    Raises:
        PomeloError: store_unavailable.
    """
    if not (outputs := media_outputs(result)):
        return result.SerializeToString()
    answer = TaskResult()
    answer.CopyFrom(result)
    streamed = stream and result.HasField("speech")
    for part, shown in zip(media_outputs(answer), outputs, strict=True):
        media.keep(part.media.id, REPLAY_SECONDS + MEDIA_GRACE_SECONDS)
        part.ClearField("data")
        if delivery == MediaDelivery.MEDIA_DELIVERY_INLINE and (shown.data or streamed):
            shown.ClearField("media")
    return answer.SerializeToString()


def restore_answer(
    answer: bytes,
    delivery: MediaDelivery.ValueType,
    owner: str,
    media: MediaStore,
    *,
    stream: bool,
    reserve: Callable[[int], None],
) -> tuple[TaskResult, Path | None]:
    """The result of a stored answer, with new links and with the bytes that are returned inline; and the file
    of its last media, None without media. `reserve` counts the inline bytes, before they are read.

    Raises:
        PomeloError: store_unavailable; a file of it is gone. What `reserve` raises.
    """
    result = TaskResult.FromString(answer)
    path = None
    streamed = stream and result.HasField("speech")  # in chunks; an image is in the result
    for part in media_outputs(result):
        try:
            path, stored = media.find(part.media.id, owner)
            if stored.size_bytes < part.media.size_bytes:  # media are not synced: the power may have failed
                raise no_such_media()
        except PomeloError as error:
            if error.code != "not_found":
                raise
            gone = "The file of the stored answer is gone. Use a new Idempotency-Key"
            raise PomeloError("store_unavailable", gone, repeatable=False) from error
        part.media.CopyFrom(stored)
        inline = stored.size_bytes <= max_inline(delivery, stream=stream) and not streamed
        if inline:
            reserve(stored.size_bytes)
            try:
                part.data = path.read_bytes()
            except OSError as error:
                raise PomeloError("store_unavailable") from error
        if delivery == MediaDelivery.MEDIA_DELIVERY_INLINE and (inline or streamed):
            part.ClearField("media")
    return result, path


def media_outputs(result: TaskResult) -> list[GeneratedImage | SpeechOutput]:
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
