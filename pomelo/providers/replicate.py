"""Replicate: an image is ordered as a prediction, polled for if necessary, and downloaded.

The models of the FLUX family take an aspect ratio and a number of megapixels instead of a size in pixels, so
the nearest ones are requested.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from math import log
from typing import Any, TypeVar

from pydantic_core import to_json
from yarl import URL

from pomelo.catalog.catalog import Route
from pomelo.fields import DEFAULT_IMAGE_SIDE
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, Options, Probe
from pomelo.providers.errors import never_retried
from pomelo.providers.fitting import Fitting
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

_Choice = TypeVar("_Choice")

DOMAIN = "replicate.com"
"""Hosts below it belong to the vendor; images are delivered from others."""

_ASPECT_SIZES = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
"""Pixels of the vendor's aspect ratios, at one megapixel."""

_SIZES = {size: (text, "1") for text, size in _ASPECT_SIZES.items()} | {
    (width // 2, height // 2): (text, "0.25") for text, (width, height) in _ASPECT_SIZES.items()
}
"""Every size in pixels that the models generate -> the aspect ratio and megapixels to request."""

_ASPECTS = {text: int(text.partition(":")[0]) / int(text.partition(":")[2]) for text in _ASPECT_SIZES}
_AREAS = {1: 1.0, 2: 0.25}
"""Divisor of the sides -> megapixels."""

_EXPECTED_SIZE = "one side of " + ", ".join(f"{width}x{height}" for width, height in _SIZES)

_MODERATED = "moderated"
_MEANINGS = {
    _MODERATED: "content_policy_violation",
    "failed": "provider_failed",
    "canceled": "provider_failed",
    "aborted": "provider_failed",
}
"""The states of a prediction that ended without an image. In an unknown state it is still running."""

_MODERATION_WORDS = ("nsfw", "sensitive", "content policy", "(e005)")
"""Words in the text of an error about a refused image: the vendor has no code for it."""

_NAMES = {"num_inference_steps": "num_inference_steps", "guidance_scale": "guidance", "seed": "seed"}
"""The contract's name of a parameter -> the vendor's."""

_FIELDS = contract_names(_NAMES) | {"aspect_ratio": "width", "megapixels": "width"}


def _read_error_body(body: Any) -> ErrorBody:
    """A prediction has a `status` and an `error`; a refusal has the `invalid_fields`, if any."""
    if not isinstance(body, dict):
        return ErrorBody()
    status, error = body.get("status"), body.get("error")
    if isinstance(error, str) and any(word in error.lower() for word in _MODERATION_WORDS):
        return ErrorBody((_MODERATED,))
    codes = (status,) if isinstance(status, str) else ()
    invalid_fields = body.get("invalid_fields")
    for field in invalid_fields if isinstance(invalid_fields, list) else ():
        name = field.get("field") if isinstance(field, dict) else None
        if isinstance(name, str):
            return ErrorBody(codes, _FIELDS.get(name.removeprefix("input.")))
    return ErrorBody(codes)


ORDER_ERRORS = ErrorMapping("replicate", _read_error_body, _MEANINGS, replays=False)
POLL_ERRORS = ErrorMapping("replicate", _read_error_body, _MEANINGS, statuses={404: "not_found"})
DELIVERY_ERRORS = ErrorMapping("replicate delivery", lambda body: ErrorBody())


class Replicate:
    """Replicate as a provider of images.

    `interval` is the number of seconds between two polls of a prediction that was not finished in the first
    response; for `grace` seconds after the order, the vendor may not know the prediction yet.
    """

    base_url = "https://api.replicate.com"
    options = Options
    probe = Probe("/v1/account")

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
        self._headers = {"Authorization": f"Bearer {key}"}

    async def aclose(self) -> None:
        await self._downloader.aclose()

    def fit_image(self, fitting: Fitting) -> None:
        """Replace a size that the models don't generate by the size with the nearest aspect ratio and
        area."""
        width, height = _size(fitting.input, fitting.route)
        if fitting.get("width") is not None or fitting.get("height") is not None:
            fitting.replace("width", width, _EXPECTED_SIZE)
            fitting.replace("height", height, _EXPECTED_SIZE)

    async def image(self, job: Job[ImageInput]) -> AsyncGenerator[Event, None]:
        """Generate an image. The vendor reports no progress, so only 0 and 1 are.

        Raises:
            UpstreamError: by the error map; without a retry once the vendor has accepted the order.
        """
        url = URL(f"{self._base}/v1/models/{job.route.model}/predictions")
        headers = self._headers | {"Content-Type": "application/json", "Prefer": "wait"}
        prediction = await self._http.request_json(
            url, headers, to_json({"input": request(job)}), ORDER_ERRORS
        )
        with never_retried():
            async with aclosing(self._wait_for_image(prediction, job.stream)) as events:
                async for event in events:
                    yield event

    async def _wait_for_image(self, prediction: Any, stream: bool) -> AsyncGenerator[Event, None]:
        """The events of a prediction that the vendor has accepted."""
        progress = ProgressEvents()
        output = _output(prediction)
        if output is None:
            if stream and (event := progress.event(0)):
                yield event
            url = self._downloader.api_url(_polling_link(prediction))
            clock = asyncio.get_running_loop().time
            grace_ends = clock() + self._grace
            polls = poll(self._http, url, self._headers, POLL_ERRORS, interval=self._interval)
            async with aclosing(polls) as states:
                async for state in states:
                    if state is UNKNOWN:
                        if clock() >= grace_ends:
                            raise malformed_response("a prediction that the vendor has lost")
                        continue
                    output = _output(state)
                    if output is not None:
                        break
        link = output[0] if isinstance(output, list) and output else output
        result = image_result(await self._downloader.fetch(link, DELIVERY_ERRORS))
        if stream and (event := progress.event(1)):
            yield event
        yield result


def request(job: Job[ImageInput]) -> dict[str, Any]:
    """Return the model's input for an image job."""
    image = job.input
    aspect, megapixels = _SIZES[_size(image, job.route)]
    file_format = FORMATS[image.output_format]
    body: dict[str, Any] = {
        "prompt": image.prompt,
        "aspect_ratio": aspect,
        "megapixels": megapixels,
        "num_outputs": 1,
        "output_format": "jpg" if file_format == "jpeg" else file_format,
    }
    body |= renamed_fields(image, _NAMES)
    if "seed" in body:
        body["go_fast"] = False  # otherwise the same seed gives another image each time
    return body


def _size(image: ImageInput, route: Route) -> tuple[int, int]:
    """The size in pixels that the models generate for an input, as near as possible in aspect ratio and
    area."""
    size = image_size(image, route)
    width, height = size.get("width", DEFAULT_IMAGE_SIDE), size.get("height", DEFAULT_IMAGE_SIDE)
    if (width, height) in _SIZES:
        return width, height
    aspect = _nearest(_ASPECTS, width / height)
    divisor = _nearest(_AREAS, width * height / 1_000_000)
    return _ASPECT_SIZES[aspect][0] // divisor, _ASPECT_SIZES[aspect][1] // divisor


def _nearest(choices: Mapping[_Choice, float], value: float) -> _Choice:
    """The choice with the smallest ratio to `value`."""
    return min(choices, key=lambda choice: abs(log(choices[choice] / value)))


def _output(prediction: Any) -> Any:
    """The output of a prediction that has succeeded; None if it is still running.

    Raises:
        UpstreamError: content_policy_violation, provider_failed.
    """
    status = prediction.get("status") if isinstance(prediction, dict) else None
    if not isinstance(status, str):
        raise malformed_response("a prediction without a status")
    if status in ("failed", "canceled", "aborted"):
        raise from_error_body(prediction, POLL_ERRORS)
    if status != "succeeded":
        return None
    output = prediction.get("output")
    if output is None:
        raise malformed_response("a prediction without an output")
    return output


def _polling_link(prediction: dict[str, Any]) -> Any:
    urls = prediction.get("urls")
    return urls.get("get") if isinstance(urls, dict) else None
