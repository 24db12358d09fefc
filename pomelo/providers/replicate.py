"""The wire of Replicate's predictions: ordered, waited for, and fetched from where it was put.

`open_providers` makes it; the engine calls `image`. It reads no key of a route beside the common ones. It
knows no key of a caller, no limit and no price. The models of the FLUX family take no size in pixels but a
shape and a number of megapixels, so the nearest ones are asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from math import log
from typing import Any, TypeVar

from pydantic_core import to_json
from yarl import URL

from pomelo.catalog.catalog import DEFAULT_IMAGE_SIDE
from pomelo.errors import PomeloError, Replay
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, Options, Probe
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.downloads import Downloader
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.polling import UNKNOWN, polled
from pomelo.providers.images import FORMATS, ProgressEvents, numbers, result, sides

_Choice = TypeVar("_Choice")

DOMAIN = "replicate.com"
"""Hosts below it are the vendor's; pictures are delivered from others."""

_SHAPES = {
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

_SIZES = {size: (text, "1") for text, size in _SHAPES.items()} | {
    (width // 2, height // 2): (text, "0.25") for text, (width, height) in _SHAPES.items()
}
"""Every size in pixels that the models make -> aspect ratio and megapixels, which is how it is asked for."""

_ASPECTS = {text: int(text.partition(":")[0]) / int(text.partition(":")[2]) for text in _SHAPES}
_AREAS = {1: 1.0, 2: 0.25}
"""What the sides are divided by -> megapixels."""

_TAKES = "one side of " + ", ".join(f"{width}x{height}" for width, height in _SIZES)

_MODERATED = "moderated"
_MEANINGS = {
    _MODERATED: "content_policy_violation",
    "failed": "provider_failed",
    "canceled": "provider_failed",
    "aborted": "provider_failed",
}
"""The states in which a prediction ends without a picture; any that is new is one in which it goes on."""

_SIGNS = ("nsfw", "sensitive", "content policy", "(e005)")
"""Words of an error's text that tell of a refused picture: the vendor has no code for it."""

_NUMBERS = {"num_inference_steps": "num_inference_steps", "guidance_scale": "guidance", "seed": "seed"}
"""The contract's name of a parameter -> the vendor's."""

_FIELDS = {
    "prompt": "prompt",
    "aspect_ratio": "width",
    "megapixels": "width",
    "num_inference_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "seed": "seed",
    "output_format": "output_format",
}


def _read_complaint(body: Any) -> ErrorBody:
    """A prediction has a `status` and an `error`; a refusal has the `invalid_fields`, if any."""
    if not isinstance(body, dict):
        return ErrorBody()
    status, error = body.get("status"), body.get("error")
    if isinstance(error, str) and any(sign in error.lower() for sign in _SIGNS):
        return ErrorBody((_MODERATED,))
    codes = (status,) if isinstance(status, str) else ()
    faults = body.get("invalid_fields")
    for fault in faults if isinstance(faults, list) else ():
        name = fault.get("field") if isinstance(fault, dict) else None
        if isinstance(name, str):
            return ErrorBody(codes, _FIELDS.get(name.removeprefix("input.")))
    return ErrorBody(codes)


ORDER = ErrorMapping("replicate", _read_complaint, _MEANINGS, replays=False)
POLL = ErrorMapping("replicate", _read_complaint, _MEANINGS, statuses={404: "not_found"})
DELIVERY = ErrorMapping("replicate delivery", lambda body: ErrorBody())


class Replicate:
    """Replicate as a provider of pictures.

    `interval` is the time in seconds between two questions about a prediction that the first answer did not
    wait for, `grace` how long after the order the vendor may not know it yet.
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
        self._links = Downloader(http, self._base, DOMAIN, waits=(interval, interval * 2, interval * 4))
        self._headers = {"Authorization": f"Bearer {key}"}

    async def aclose(self) -> None:
        """Closes the connections to where pictures are fetched from."""
        await self._links.aclose()

    def fit_image(self, fitting: Fitting) -> None:
        """Replaces a size that the models don't make by the one with the nearest shape and area."""
        size = sides(fitting.input, fitting.route)
        width, height = _nearest_size(
            size.get("width", DEFAULT_IMAGE_SIDE), size.get("height", DEFAULT_IMAGE_SIDE)
        )
        if fitting.get("width") is not None or fitting.get("height") is not None:
            fitting.replace("width", width, _TAKES)
            fitting.replace("height", height, _TAKES)

    async def image(self, job: Job) -> AsyncGenerator[Event, None]:
        """Draws a picture; see JobMethod. The vendor tells of no progress but its begin and its end.

        Raises:
            PomeloError: by the map in `failures`; once the vendor has taken the order, never one to replay.
        """
        url = URL(f"{self._base}/v1/models/{job.route.model}/predictions")
        headers = self._headers | {"Content-Type": "application/json", "Prefer": "wait"}
        prediction = await self._http.whole(url, headers, to_json({"input": request(job)}), ORDER)
        try:
            async with aclosing(self._awaited(prediction, job.stream)) as events:
                async for event in events:
                    yield event
        except PomeloError as error:
            error.replay = Replay.NEVER
            raise

    async def _awaited(self, prediction: Any, stream: bool) -> AsyncGenerator[Event, None]:
        """The events of a prediction that the vendor has taken."""
        progress = ProgressEvents()
        links = _links(prediction)
        if links is None:
            if stream and (event := progress.event(0)):
                yield event
            url = self._links.vendors(_get(prediction))
            clock = asyncio.get_running_loop().time
            patient_until = clock() + self._grace
            async with aclosing(
                polled(self._http, url, self._headers, POLL, interval=self._interval)
            ) as answers:
                async for answer in answers:
                    if answer is UNKNOWN:
                        if clock() >= patient_until:
                            raise malformed_response("a prediction that the vendor has lost")
                        continue
                    links = _links(answer)
                    if links is not None:
                        break
        link = links[0] if isinstance(links, list) and links else links
        picture = result(await self._links.fetch(link, DELIVERY))
        if stream and (event := progress.event(1)):
            yield event
        yield picture


def request(job: Job) -> dict[str, Any]:
    """The model's input for an image job."""
    given: ImageInput = job.input
    size = sides(given, job.route)
    width, height = _nearest_size(
        size.get("width", DEFAULT_IMAGE_SIDE), size.get("height", DEFAULT_IMAGE_SIDE)
    )
    aspect, megapixels = _SIZES[width, height]
    wanted = FORMATS[given.output_format]
    body: dict[str, Any] = {
        "prompt": given.prompt,
        "aspect_ratio": aspect,
        "megapixels": megapixels,
        "num_outputs": 1,
        "output_format": "jpg" if wanted == "jpeg" else wanted,
    }
    body |= numbers(given, _NUMBERS)
    if "seed" in body:
        body["go_fast"] = False  # with it a seed gives another picture each time
    return body


def _nearest_size(width: int, height: int) -> tuple[int, int]:
    """The size that the models make whose shape and area are the fewest times larger or smaller."""
    if (width, height) in _SIZES:
        return width, height
    aspect = _nearest(_ASPECTS, width / height)
    divisor = _nearest(_AREAS, width * height / 1_000_000)
    return _SHAPES[aspect][0] // divisor, _SHAPES[aspect][1] // divisor


def _nearest(choices: Mapping[_Choice, float], value: float) -> _Choice:
    """The choice that is the fewest times larger or smaller than `value`."""
    return min(choices, key=lambda choice: abs(log(choices[choice] / value)))


def _links(prediction: Any) -> Any:
    """The output of a prediction that has succeeded; None of one that goes on.

    Raises:
        PomeloError: content_policy_violation, provider_failed.
    """
    status = prediction.get("status") if isinstance(prediction, dict) else None
    if not isinstance(status, str):
        raise malformed_response("a prediction without a status")
    if status in ("failed", "canceled", "aborted"):
        raise from_error_body(prediction, POLL)
    if status != "succeeded":
        return None
    output = prediction.get("output")
    if output is None:
        raise malformed_response("a prediction without an output")
    return output


def _get(prediction: dict[str, Any]) -> Any:
    urls = prediction.get("urls")
    return urls.get("get") if isinstance(urls, dict) else None
