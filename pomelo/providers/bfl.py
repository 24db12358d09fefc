"""The wire of Black Forest Labs: a picture is ordered, asked about, and fetched before its link expires.

`open_providers` makes it; the engine calls `image`. It reads the key `safety_tolerance` of a route beside
the common ones (sent as it is; default 2). It knows no key of a caller, no limit and no price.
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

from pomelo.errors import PomeloError, Replay
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, Options, Probe
from pomelo.providers.http.client import Http
from pomelo.providers.http.downloads import Downloader
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.polling import UNKNOWN, polled
from pomelo.providers.images import FORMATS, ProgressEvents, numbers, result, sides

DOMAIN = "bfl.ai"
"""Hosts below it are the vendor's: its answers name one of several clusters."""

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
"""The states in which a task ends without a picture; any that is new is one in which it goes on."""

_DETAILS = frozenset((_MISSING, "request moderated", "content moderated"))
"""States that an error's text may name; any other text is one for people."""

_CREDIT = Decimal("0.01")
"""US dollars."""

_NUMBERS = {"num_inference_steps": "steps", "guidance_scale": "guidance", "seed": "seed"}
"""The contract's name of a parameter -> the vendor's."""

_FIELDS = {
    "prompt": "prompt",
    "width": "width",
    "height": "height",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "seed": "seed",
    "output_format": "output_format",
}
"""The vendor's name of a parameter -> the contract's."""


def _read_complaint(body: Any) -> ErrorBody:
    """A refusal has a text or a list of faults as `detail`; a task has a `status`, also in an error."""
    if not isinstance(body, dict):
        return ErrorBody()
    status, detail = body.get("status"), body.get("detail")
    codes: tuple[str, ...] = (status.lower(),) if isinstance(status, str) else ()
    if isinstance(detail, str) and detail.lower() in _DETAILS:
        codes += (detail.lower(),)
    for fault in detail if isinstance(detail, list) else ():
        place = fault.get("loc") if isinstance(fault, dict) else None
        if isinstance(place, list) and len(place) > 1 and isinstance(place[1], str):
            return ErrorBody(codes, _FIELDS.get(place[1]))
    return ErrorBody(codes)


ORDER = ErrorMapping("bfl", _read_complaint, _MEANINGS | {_MISSING: "provider_failed"}, replays=False)
"""Of the one request that is paid for."""

POLL = ErrorMapping("bfl", _read_complaint, _MEANINGS, statuses={404: "not_found"})
DELIVERY = ErrorMapping("bfl delivery", lambda body: ErrorBody())


class BFLOptions(Options):
    """What a route may say."""

    safety_tolerance: Annotated[int, Field(ge=0, le=6)] = SAFETY_TOLERANCE


class BFL:
    """Black Forest Labs as a provider of pictures.

    `interval` is the time in seconds between two questions about a task, `grace` how long after the order
    the vendor may not know it yet.
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
        self._links = Downloader(http, self._base, DOMAIN, waits=(interval, interval * 2, interval * 4))
        self._headers = {"x-key": key, "Accept": "application/json"}

    async def aclose(self) -> None:
        """Closes the connections to where pictures are fetched from."""
        await self._links.aclose()

    async def image(self, job: Job) -> AsyncGenerator[Event, None]:
        """Draws a picture; see JobMethod.

        Raises:
            PomeloError: by the map in `failures`; once the vendor has taken the order, never one to replay.
        """
        url = URL(f"{self._base}/v1/{job.route.model}")
        headers = self._headers | {"Content-Type": "application/json"}
        order = await self._http.whole(url, headers, to_json(request(job)), ORDER)
        try:
            async with aclosing(self._awaited(order, job)) as events:
                async for event in events:
                    yield event
        except PomeloError as error:
            error.replay = Replay.NEVER
            raise

    async def _awaited(self, order: Any, job: Job) -> AsyncGenerator[Event, None]:
        """The events of a task that the vendor has taken."""
        if not isinstance(order, dict):
            raise malformed_response("an order of another shape")
        if "polling_url" not in order:
            raise from_error_body(order, ORDER)
        url = self._links.vendors(order["polling_url"])
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
        picture = result(await self._links.fetch(link, DELIVERY))
        if stream and (event := progress.event(1)):
            yield event
        yield picture

    async def _states(self, url: URL) -> AsyncGenerator[dict[str, Any], None]:
        """What the vendor says of a task while it is not lost.

        Raises:
            PomeloError: content_policy_violation, provider_failed; by the map.
        """
        clock = asyncio.get_running_loop().time
        patient_until = clock() + self._grace
        async with aclosing(polled(self._http, url, self._headers, POLL, interval=self._interval)) as answers:
            async for state in answers:
                if state is UNKNOWN:
                    state = {"status": _MISSING}
                if not isinstance(state, dict) or not isinstance(state.get("status"), str):
                    raise malformed_response("a task without a status")
                status = state["status"].lower()
                if status == _MISSING:
                    if clock() >= patient_until:
                        raise malformed_response("a task that the vendor has lost")
                elif status in _MEANINGS:
                    raise from_error_body(state, POLL)
                else:
                    yield state


def _dollars(credits_told: Any) -> Any:
    """The vendor's credits in US dollars; what is no number is passed on, to be refused."""
    return Decimal(str(credits_told)) * _CREDIT if type(credits_told) in (int, float) else credits_told


def request(job: Job) -> dict[str, Any]:
    """The request body for an image job."""
    given: ImageInput = job.input
    route = job.route
    body: dict[str, Any] = {"prompt": given.prompt, **sides(given, route)}
    body |= numbers(given, _NUMBERS)
    body["safety_tolerance"] = route.options.get("safety_tolerance", SAFETY_TOLERANCE)
    body["output_format"] = FORMATS[given.output_format]
    return body
