"""Black Forest Labs: an image is ordered, polled for, and downloaded before its link expires.

It reads one key of a route: `safety_tolerance`, which is sent unchanged (default 2).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from decimal import Decimal
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import to_json
from yarl import URL

from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, Options, Probe
from pomelo.providers.errors import never_retried
from pomelo.providers.http.client import Http
from pomelo.providers.http.downloads import Downloader
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.polling import UNKNOWN, poll
from pomelo.providers.images import (
    FORMATS,
    ProgressEvents,
    contract_names,
    image_result,
    image_size,
    renamed_fields,
)

DOMAIN = "bfl.ai"
"""Hosts below it belong to the vendor: its responses name one of several clusters."""

SAFETY_TOLERANCE = 2
"""The vendor's own default, of 0 (strict) to 6."""

_READY = "ready"
_MISSING = "task not found"

_MEANINGS = {
    "request moderated": "content_policy_violation",
    "content moderated": "content_policy_violation",
    "error": "provider_failed",
    "failed": "provider_failed",
    _MISSING: "not_found",
}
"""The states of a task that ended without an image. In an unknown state the task is still running."""

_DETAILS = frozenset((_MISSING, "request moderated", "content moderated"))
"""States that the text of an error may be; any other text is for humans."""

_CREDIT_DOLLARS = Decimal("0.01")

_NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance", "seed": "seed"}
"""The contract's name of a parameter -> the vendor's."""

_FIELDS = contract_names(_NAMES)


def _read_error_body(body: Any) -> ErrorBody:
    """A refusal has a text or a list of errors as `detail`; a task has a `status`, also in an error."""
    if not isinstance(body, dict):
        return ErrorBody()
    status, detail = body.get("status"), body.get("detail")
    codes: tuple[str, ...] = (status.lower(),) if isinstance(status, str) else ()
    if isinstance(detail, str) and detail.lower() in _DETAILS:
        codes += (detail.lower(),)
    for error in detail if isinstance(detail, list) else ():
        path = error.get("loc") if isinstance(error, dict) else None
        if isinstance(path, list) and len(path) > 1 and isinstance(path[1], str):
            return ErrorBody(codes, _FIELDS.get(path[1]))
    return ErrorBody(codes)


ORDER_ERRORS = ErrorMapping("bfl", _read_error_body, _MEANINGS | {_MISSING: "provider_failed"}, replays=False)
"""Errors of the one request that is charged."""

POLL_ERRORS = ErrorMapping("bfl", _read_error_body, _MEANINGS, statuses={404: "not_found"})
DELIVERY_ERRORS = ErrorMapping("bfl delivery", lambda body: ErrorBody())


class BFLOptions(Options):
    safety_tolerance: Annotated[int, Field(ge=0, le=6)] = SAFETY_TOLERANCE


class BFL:
    """Black Forest Labs as a provider of images.

    `interval` is the number of seconds between two polls of a task; for `grace` seconds after the order, the
    vendor may not know the task yet.
    """

    base_url = "https://api.bfl.ai"
    options = BFLOptions
    probe = Probe("/v1/credits", "x-key", "")

    def __init__(
        self, credentials: Credentials, http: Http, *, interval: float = 0.5, grace: float = 5.0
    ) -> None:
        key = (credentials.api_key or "").strip()
        self.configured = bool(key)
        self._http = http
        self._interval = interval
        self._grace = grace
        self._base = credentials.base_url.rstrip("/")
        self._downloader = Downloader(http, self._base, DOMAIN, waits=(interval, interval * 2, interval * 4))
        self._headers = {"x-key": key, "Accept": "application/json"}

    async def aclose(self) -> None:
        await self._downloader.aclose()

    async def image(self, job: Job[ImageInput]) -> AsyncGenerator[Event, None]:
        """Generate an image.

        Raises:
            UpstreamError: by the error map; without a retry once the vendor has accepted the order.
        """
        url = URL(f"{self._base}/v1/{job.route.model}")
        headers = self._headers | {"Content-Type": "application/json"}
        order = await self._http.request_json(url, headers, to_json(request(job)), ORDER_ERRORS)
        with never_retried():
            async with aclosing(self._wait_for_image(order, job)) as events:
                async for event in events:
                    yield event

    async def _wait_for_image(self, order: Any, job: Job[ImageInput]) -> AsyncGenerator[Event, None]:
        """The events of an order that the vendor has accepted."""
        if not isinstance(order, dict):
            raise malformed_response("an order of another shape")
        if "polling_url" not in order:
            raise from_error_body(order, ORDER_ERRORS)
        url = self._downloader.api_url(order["polling_url"])
        job.report.cost = _dollars(order.get("cost"))
        stream, progress = job.stream, ProgressEvents()
        if stream and (event := progress.event(0)):
            yield event
        sample = None
        async with aclosing(self._states(url)) as states:
            async for state in states:
                if stream and (event := progress.event(state.get("progress"))):
                    yield event
                if state["status"].lower() == _READY:
                    sample = state.get("result")
                    break
        link = sample.get("sample") if isinstance(sample, dict) else None
        result = image_result(await self._downloader.fetch(link, DELIVERY_ERRORS))
        if stream and (event := progress.event(1)):
            yield event
        yield result

    async def _states(self, url: URL) -> AsyncGenerator[dict[str, Any], None]:
        """The states of a task, until it fails.

        Raises:
            UpstreamError: content_policy_violation, provider_failed; by the error map.
        """
        clock = asyncio.get_running_loop().time
        grace_ends = clock() + self._grace
        polls = poll(self._http, url, self._headers, POLL_ERRORS, interval=self._interval)
        async with aclosing(polls) as states:
            async for state in states:
                if state is UNKNOWN:
                    state = {"status": _MISSING}
                if not isinstance(state, dict) or not isinstance(state.get("status"), str):
                    raise malformed_response("a task without a status")
                status = state["status"].lower()
                if status == _MISSING:
                    if clock() >= grace_ends:
                        raise malformed_response("a task that the vendor has lost")
                elif status in _MEANINGS:
                    raise from_error_body(state, POLL_ERRORS)
                else:
                    yield state


def _dollars(cost: Any) -> Any:
    """The vendor's credits in US dollars. What is not a number is returned unchanged, and not billed."""
    return Decimal(str(cost)) * _CREDIT_DOLLARS if type(cost) in (int, float) else cost


def request(job: Job[ImageInput]) -> dict[str, Any]:
    """Return the request body for an image job."""
    image, route = job.input, job.route
    body: dict[str, Any] = {"prompt": image.prompt, **image_size(image, route)}
    body |= renamed_fields(image, _NAMES)
    body["safety_tolerance"] = route.options.get("safety_tolerance", SAFETY_TOLERANCE)
    body["output_format"] = FORMATS[image.output_format]
    return body
