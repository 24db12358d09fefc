"""What providers of images share: sizes, formats, events, and the way from an order to a file."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from contextvars import Context
from dataclasses import replace
from math import isfinite
from typing import Any, ClassVar

from pydantic_core import to_json
from yarl import URL

from pomelo.catalog.catalog import Route
from pomelo.fields import DEFAULT_IMAGE_SIDE
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageFormat, ImageInput, ImageOutput, ImageProgress
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.media.content_types import image_type, is_complete_image
from pomelo.protobuf.enums import enum_names
from pomelo.providers.base import Event, Job
from pomelo.providers.credentials import Credentials
from pomelo.providers.errors import UpstreamError, never_retried
from pomelo.providers.http.client import Http
from pomelo.providers.http.downloads import Downloader
from pomelo.providers.http.errors import (
    ErrorBody,
    ErrorMapping,
    from_error_body,
    incomplete_file,
    malformed_response,
)
from pomelo.providers.http.parsing import pick, pick_text
from pomelo.providers.http.polling import MAX_FAILURES, POLL_TIMEOUT, UNKNOWN, poll
from pomelo.providers.http.vendor import Vendor

FORMATS = {ImageFormat.IMAGE_FORMAT_UNSPECIFIED: "png"} | enum_names(ImageFormat.DESCRIPTOR)
"""The contract's formats -> the names that most vendors use."""

POLL_INTERVAL = 0.5
"""Default number of seconds between two polls of a task."""

_CLOSE_TIMEOUT = 0.5
"""Seconds for which closing a provider, which may take one second, waits until orders are cancelled."""

DELIVERY_ERRORS = ErrorMapping("delivery of an image", lambda body: ErrorBody())
"""Errors of downloads."""


class ProgressEvents:
    """Makes the progress events of an image: from 0 to 1, never falling; none unless it is streamed."""

    __slots__ = ("_reported", "_stream")

    def __init__(self, stream: bool) -> None:
        self._stream = stream
        self._reported = -1.0

    def event(self, progress: Any) -> Event | None:
        """Return the event for a progress; None if it has not grown, or is not a finite number."""
        # isfinite() fails for a whole number that is too large for a float.
        if type(progress) not in (int, float) or (type(progress) is float and not isfinite(progress)):
            return None
        progress = min(max(progress, 0.0), 1.0)
        if not self._stream or progress <= self._reported:
            return None
        self._reported = progress
        return Event(image_progress=ImageProgress(progress=progress))


class OrderedImages(Vendor, ABC):
    """A vendor whose images are ordered, polled for, and downloaded before their link expires.

    `interval` is the number of seconds between two polls of a task (None: POLL_INTERVAL); for `grace` seconds
    after the order, the vendor may not know the task yet.
    """

    domain: ClassVar[str]
    """Hosts below it belong to the vendor."""
    errors: ClassVar[ErrorMapping]
    """Errors of the order, the one request that is charged. The `meanings` of polls have the states of a task
    that ended without an image."""
    ready: ClassVar[str]
    """The state of a finished task. In an unknown state it is still running."""

    def __init__(
        self, credentials: Credentials, http: Http, *, interval: float | None = None, grace: float = 5.0
    ) -> None:
        super().__init__(credentials, http)
        self._interval = interval = POLL_INTERVAL if interval is None else interval
        self._grace = grace
        self._downloader = Downloader(
            http, self._base, self.domain, waits=(interval, interval * 2, interval * 4)
        )
        self._poll_errors = replace(
            self.errors,
            meanings={**self.errors.meanings, UNKNOWN: "not_found"},
            statuses={404: "not_found"},
            replays=True,
        )
        self._cancelling: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await asyncio.gather(*self._cancelling)
        await self._downloader.aclose()

    @abstractmethod
    def _order(self, job: Job[ImageInput]) -> tuple[str, Mapping[str, str], dict[str, Any]]:
        """Return the path below the base URL, the headers and the body of an order."""

    @abstractmethod
    def _polling_url(self, order: Any, job: Job[ImageInput]) -> URL | None:
        """Return the URL to poll from the response to an order; None if that is the finished task."""

    @abstractmethod
    def _image_link(self, task: dict[str, Any]) -> object:
        """Return the link to the image of a finished task."""

    def _cancel_link(self, order: Any) -> str:
        """Return the link that cancels the task of an order, by POST; empty without one."""
        return ""

    async def image(self, job: Job[ImageInput]) -> AsyncGenerator[Event, None]:
        """Generate an image.

        Raises:
            UpstreamError: by the error map; without a retry once the vendor has accepted the order.
        """
        path, headers, body = self._order(job)
        order = task = await self._http.request_json(
            URL(self._base + path), headers, to_json(body), self.errors
        )
        with never_retried():
            progress = ProgressEvents(job.stream)
            url = self._polling_url(task, job)
            if url is not None:
                try:
                    if event := progress.event(0):
                        yield event
                    async with aclosing(self._states(url)) as states:
                        async for task in states:
                            finished = self._finished(task)
                            if event := progress.event(task.get("progress")):
                                yield event
                            if finished:
                                break
                except (asyncio.CancelledError, GeneratorExit):
                    self._cancel(order)
                    raise
            result = image_result(await fetch_image(self._downloader, self._image_link(task)))
            if event := progress.event(1):
                yield event
            yield result

    def _cancel(self, order: Any) -> None:
        """Cancel the task of an order whose caller has left, in the background: the vendor charges it."""
        if link := self._cancel_link(order):
            # In a context of its own: it counts for no account, and is not the last request of a call.
            task = asyncio.get_running_loop().create_task(self._request_cancel(link), context=Context())
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    async def _request_cancel(self, link: str) -> None:
        with suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(POLL_TIMEOUT):
                url = self._downloader.api_url(link)
                await self._http.request_json(url, self._json_headers, b"{}", self._poll_errors)

    async def _states(self, url: URL) -> AsyncGenerator[Any, None]:
        """The states of a task. Up to MAX_FAILURES responses in a row may have no state, or, after the grace,
        not find the task."""
        clock = asyncio.get_running_loop().time
        grace_ends = clock() + self._grace
        lost = 0
        polls = poll(self._http, url, self._headers, self._poll_errors, interval=self._interval)
        async with aclosing(polls) as states:
            async for state in states:
                status = pick_text(state, "status").lower()
                if status not in ("", UNKNOWN):
                    lost = 0
                    yield state
                elif (not status or clock() >= grace_ends) and (lost := lost + 1) > MAX_FAILURES:
                    raise malformed_response("a task that the vendor has lost, or without a status")

    def _finished(self, task: Any) -> bool:
        """Return whether a task has finished.

        Raises:
            UpstreamError: content_policy_violation, provider_failed; it has ended without an image.
        """
        status = pick(task, "status")
        if not isinstance(status, str):
            raise malformed_response("a task without a status")
        status = status.lower()
        if status in self.errors.meanings:
            raise from_error_body(task, self.errors)
        return status == self.ready


def image_size(image: ImageInput, route: Route) -> dict[str, int]:
    """Return width and height in pixels; if the caller did not set one, the default in the route's range."""
    size = {}
    for name in ("width", "height"):
        side = getattr(image, name) if image.HasField(name) else route.fit(name, DEFAULT_IMAGE_SIDE)
        if side is not None:
            size[name] = side
    return size


def renamed_fields(image: ImageInput, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields in `names` that are set, by the vendor's names: `names` maps ours to the vendor's."""
    values = {field.name: value for field, value in image.ListFields()}
    return {vendor_name: values[name] for name, vendor_name in names.items() if name in values}


def contract_names(names: Mapping[str, str]) -> dict[str, str]:
    """Return the contract's names by the vendor's, for error bodies: those in `names`, and those that are the
    same."""
    same = ("prompt", "width", "height", "output_format")
    return {name: name for name in same} | {vendor_name: name for name, vendor_name in names.items()}


async def fetch_image(downloader: Downloader, link: object) -> bytes:
    """Download the file of an image, for `image_result`.

    Raises:
        UpstreamError: as `Downloader.fetch`.
    """
    return await downloader.fetch(link, DELIVERY_ERRORS, is_complete_image)


def image_result(data: bytes) -> Event:
    """Return the event of a finished image. The content type is that of the file's first bytes.

    Raises:
        UpstreamError: provider_failed; the file is not a PNG, JPEG or WebP, or it lacks its end.
    """
    content_type = image_type(data)
    if content_type is None or content_type == "image/gif":
        raise malformed_response("a file that is not an image")
    if not is_complete_image(data):
        raise incomplete_file("an image without its end")
    image = GeneratedImage(data=data, content_type=content_type)
    return Event(completed=TaskResult(image=ImageOutput(images=[image])))
