"""Accepts tasks: what can be refused before limits, credits and providers are involved.

Headers, model, fields and audio are checked in this order, the same over both protocols. Nothing is reserved
here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pomelo.accounts.access import Access
from pomelo.call import STRICT, Call, Principal
from pomelo.catalog import retirement
from pomelo.catalog.catalog import Model
from pomelo.engine import idempotency, shared_media
from pomelo.engine.job import AcceptedJob
from pomelo.engine.routing import Candidate, LiveCandidate, Router
from pomelo.errors import PomeloError, invalid, missing
from pomelo.fields import check_enum
from pomelo.gen.v1.media_pb2 import Media, MediaDelivery, MediaSource
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.ids import new_id
from pomelo.media.audio import AudioSource
from pomelo.media.content_types import HEAD_BYTES, UNKNOWN, image_type, sniff
from pomelo.media.duration import Measurer
from pomelo.media.store import MediaStore
from pomelo.protobuf.unknown_fields import check_no_unknown_fields
from pomelo.providers.base import Job
from pomelo.providers.fitting import Fitting, Given
from pomelo.stores.usage import encode_metadata
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import LARGE, AudioInfo, Estimate, TaskDefinition, no_media
from pomelo.tasks.labels import check_labels

INLINE_LIMIT = 4 * 1024 * 1024
"""Bytes of audio that a gRPC caller may send inline in a task."""

MAX_IMAGE_FILES = 8 * 1024 * 1024
"""Bytes of all images of a task that are files, as many as the largest message has inline."""


class Acceptance:
    """Turns tasks into jobs, or refuses them.

    `inline_limit` is the most bytes of inline audio over gRPC, `now` is Unix time.
    """

    def __init__(
        self,
        *,
        access: Access,
        router: Router,
        media: MediaStore,
        measurer: Measurer,
        inline_limit: int = INLINE_LIMIT,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._access = access
        self._router = router
        self._media = media
        self._measurer = measurer
        self._inline_limit = inline_limit
        self._now = now

    async def accept(
        self, spec: TaskSpec, options: TaskOptions, call: Call, principal: Principal, *, stream: bool
    ) -> AcceptedJob:
        """The job of a valid task. Writes the headers about its model, and whether strict handling applies.

        Raises:
            PomeloError: what is wrong with the headers, the model or the fields, in this order;
                store_unavailable.
        """
        if call.header_error is not None:
            raise call.header_error
        if not spec.model:
            raise missing("model")
        model = self._access.model(spec.model, principal)
        if model.retires is not None or model.deprecated is not None:
            call.response_headers |= retirement.headers(model)
        definition = TASK_TYPES[model.task_type]
        which = spec.WhichOneof("input")
        if which is not None and which != definition.name:
            raise PomeloError(
                "invalid_parameter",
                f"Invalid input: {spec.model} takes {definition.name}, not {which}",
                field=which,
                values={"model": spec.model, "taskType": definition.name},
            )
        size = spec.ByteSize()
        large = size > LARGE
        task_input = getattr(spec, definition.name)
        check_first = None
        if large:
            check_first = partial(_check_unknown_fields, spec, size, options)
            if self._media.shared:  # before its files are fetched
                await asyncio.to_thread(check_first)
                check_first = None
        else:
            _check_unknown_fields(spec, size, options)
            try:
                definition.check(task_input, model, _need_file)
            except _FileNeededError:
                large = True
        if large:
            await self._check_with_files(task_input, model, definition, call, principal, check_first)
        check_labels(spec)
        if options.delivery:
            check_enum(options, "delivery", MediaDelivery)
        given = Given(task_input, spec.user)
        try:
            candidates = self._router.candidates(model, definition.name, live=principal.live)
        except PomeloError:  # provider_not_configured, which is refused after the limits and credits
            candidates = []
        fit_input = partial(self._fit, given, model, definition, candidates, call, stream)
        fitted, billed, estimate = await asyncio.to_thread(fit_input) if large else fit_input()
        if call.strict:
            call.response_headers["Preference-Applied"] = STRICT
            if billed.adjustments:
                raise billed.refusal()
        audio, info = None, _NO_AUDIO
        if definition.audio:
            audio = await self._audio_source(task_input.audio, call, principal)
        key = None
        if call.idempotency_key is not None:
            key = await idempotency.idempotency_key(call.idempotency_key, spec, audio)
        if audio is not None:
            measured = await self._measurer.measure(audio, principal.account, call.request_id)
            audio = replace(audio, ms=measured.ms, content_type=measured.content_type)
            info = AudioInfo(audio.size, audio.ms)
            if info.exceeds(model):
                most = model.limits.max_audio_seconds
                raise invalid("audio", f"audio of at most {most} seconds", maximum=most)
            estimate = definition.estimate(billed.input, model, billed.route, info)
        prices, price_version = model.prices_for(billed.route)
        media_bytes = 0
        if definition.media_size is not no_media and (
            key is not None or options.delivery == MediaDelivery.MEDIA_DELIVERY_LINK
        ):
            output = estimate
            if not principal.live:  # the sandbox accepts input that a live model does not
                output = definition.estimate(fitted.input, model, fitted.route, info)
            media_bytes = definition.media_size(fitted.input, output)
        job = Job(
            task_id=new_id(definition.id_prefix),
            model=model,
            route=fitted.route,
            input=fitted.input,
            stream=stream,
            deadline=call.deadline,
            audio=audio,
            adjustments=billed.adjustments,
            user=fitted.user,
            given=given,
            request_id=call.request_id,
        )
        return AcceptedJob(
            job=job,
            user=spec.user.replace("\0", "\ufffd"),  # which Postgres does not store
            metadata=encode_metadata(spec.metadata) if spec.metadata else "",
            delivery=options.delivery,
            principal=principal,
            protocol=call.protocol,
            definition=definition,
            candidates=tuple(candidates),
            estimate=estimate,
            prices=prices,
            price_version=price_version,
            idempotency_key=key,
            media_bytes=media_bytes,
            created=int(self._now()),
        )

    async def _check_with_files(
        self,
        task_input: Any,
        model: Model,
        definition: TaskDefinition,
        call: Call,
        principal: Principal,
        check_first: Callable[[], None] | None,
    ) -> None:
        """Refuses an input that the model can't take, after `check_first`, both in a thread. Its files count
        as if they were inline.

        Raises:
            PomeloError: what is wrong with the input, or with a file; overloaded, store_unavailable.
        """
        files = _ImageFiles(self._media, principal)

        def check() -> None:
            if check_first is not None:
                check_first()
            definition.check(task_input, model, files.read)

        if self._media.shared:
            await shared_media.fetch_files(
                definition.files, task_input, MAX_IMAGE_FILES, principal.owner, self._media, call
            )
        try:
            await asyncio.to_thread(check)
        finally:
            call.file_bytes = files.size
            call.reserve(files.size)

    def _fit(
        self,
        given: Given[Any],
        model: Model,
        definition: TaskDefinition,
        routes: list[Candidate],
        call: Call,
        stream: bool,
    ) -> tuple[Fitting, Fitting, Estimate]:
        """The input as the first of the `routes` takes it; as the route takes it by which it is billed and
        adjusted; and the estimate of the latter, without its audio. With strict handling, only routes without
        adjustments may take over from the first one: the others are removed."""
        first = routes[0] if routes else None
        if isinstance(first, LiveCandidate):
            fitted = billed = first.fit(given, model)
            if call.strict:
                routes[1:] = [other for other in routes[1:] if not other.fit(given, model).adjustments]
        else:
            billed = self._router.preview(model, definition.name, given)
            fitted = billed if first is None else first.fit(given, model)
        estimate = definition.estimate(billed.input, model, billed.route, _NO_AUDIO)
        if stream:  # not later: the progress of all streams is computed in one step
            estimate.count_input()
        return fitted, billed, estimate

    async def _audio_source(self, audio: MediaSource, call: Call, principal: Principal) -> AudioSource:
        if audio.media_id:
            if self._media.shared:
                await self._media.fetch(audio.media_id, principal.owner, call)
            path, media = _find(self._media, audio.media_id, principal, "audio")
            content_type = media.content_type
            is_certain = content_type != UNKNOWN and not content_type.startswith("image/")
            if audio.content_type not in ("", content_type) or not is_certain:
                content_type = _audio_type(audio.content_type, _read_head(path), content_type)
            return AudioSource(content_type, media.size_bytes, path=path)
        data = audio.data  # a copy each time
        size = len(data)
        # A REST caller can't upload: the gateway decides what goes inline, within the limits of its bodies.
        if size > self._inline_limit and call.protocol != "rest":
            raise PomeloError(
                "payload_too_large",
                f"audio is larger than the {self._inline_limit:,} bytes that may be inline. Upload it",
                field="audio",
                values={"maxBytes": self._inline_limit},
            )
        return AudioSource(_audio_type(audio.content_type, data[:HEAD_BYTES]), size, data=data)


_NO_AUDIO = AudioInfo()


def _check_unknown_fields(spec: TaskSpec, size: int, options: TaskOptions) -> None:
    """Refuses a task of `size` bytes, or its options, with a field that this version does not know.

    Raises:
        PomeloError: invalid_parameter.
    """
    check_no_unknown_fields(spec, size, "the task")
    if size := options.ByteSize():
        check_no_unknown_fields(options, size, "the options")


class _FileNeededError(Exception):
    """An image of a task is a file: it is read in a thread, so that it does not block the event loop."""


def _need_file(media_id: str, field: str) -> bytes:
    raise _FileNeededError


class _ImageFiles:
    """The files of one task that are images. Each is read once, however many parts name it."""

    def __init__(self, media: MediaStore, principal: Principal) -> None:
        self._media = media
        self._principal = principal
        self._contents: dict[str, bytes] = {}
        self.size = 0
        """Bytes of the files, as often as they are named."""

    def read(self, media_id: str, field: str) -> bytes:
        data = self._contents.get(media_id)
        if data is None:
            path, media = _find(self._media, media_id, self._principal, field)
            self._count(media.size_bytes, field)
            try:
                data = self._contents[media_id] = path.read_bytes()
            except OSError as error:
                raise PomeloError("store_unavailable") from error
        else:
            self._count(len(data), field)
        return data

    def _count(self, size: int, field: str) -> None:
        if self.size + size > MAX_IMAGE_FILES:
            raise PomeloError(
                "payload_too_large",
                f"The images' files have more than {MAX_IMAGE_FILES:,} bytes in all. Send smaller ones",
                field=field,
                values={"maxBytes": MAX_IMAGE_FILES},
            )
        self.size += size


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise PomeloError("store_unavailable") from error


def _audio_type(given: str, head: bytes, stored: str = UNKNOWN) -> str:
    """The content type of audio that begins with `head`: that of the bytes, else the one `given` by the task,
    else the one it is `stored` with.

    Raises:
        PomeloError: invalid_parameter, the bytes are an image, or samples that no provider takes.
    """
    content_type = sniff(given, head)
    if content_type != UNKNOWN and not content_type.startswith("image/"):
        return content_type
    if image_type(head) is not None:
        raise invalid("audio", "audio. Its bytes are an image")
    return UNKNOWN if stored.startswith("image/") else stored


def _find(media: MediaStore, media_id: str, principal: Principal, field: str) -> tuple[Path, Media]:
    try:
        return media.find(media_id, principal.owner)
    except PomeloError as error:
        if error.code != "not_found":
            raise
        raise invalid(
            field, "a file that this account uploaded in the same mode within the last hour"
        ) from error
