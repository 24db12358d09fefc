"""The wire of Together's images: one request, and the image is in its answer, or behind a link in it.

`open_providers` makes it; the engine calls `image`. It reads no key of a route beside the common ones. It
knows no key of a caller, no limit and no price.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import to_json
from yarl import URL

from pomelo.errors import PomeloError, Replay
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, Options, Probe
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.downloads import FILE_MOST, Downloader, from_base64
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, from_error_body, malformed_response
from pomelo.providers.images import FORMATS, ProgressEvents, numbers, result, sides

ANSWER_MOST = FILE_MOST * 4 // 3 + 64 * 1024
"""Bytes of an answer: the largest picture as base64, and what surrounds it."""

DOMAIN = "together.ai"

_NUMBERS = {"num_inference_steps": "steps", "guidance_scale": "guidance_scale", "seed": "seed"}
"""The contract's name of a parameter -> the vendor's."""

_FIELDS = {
    "prompt": "prompt",
    "width": "width",
    "height": "height",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "seed": "seed",
    "output_format": "output_format",
}

_MEANINGS = {
    "content_policy_violation": "content_policy_violation",
    "content_filter": "content_policy_violation",
    "rate_limit": "provider_unavailable",
    "rate_limit_exceeded": "provider_unavailable",
    "insufficient_quota": "provider_failed",
    "insufficient_credits": "provider_failed",
    "invalid_api_key": "provider_failed",
}


def _read_complaint(body: Any) -> ErrorBody:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return ErrorBody()
    codes = tuple(word for key in ("code", "type") if isinstance(word := error.get(key), str))
    param = error.get("param")
    return ErrorBody(codes, _FIELDS.get(param) if isinstance(param, str) else None)


DIALECT = ErrorMapping("together", _read_complaint, _MEANINGS, replays=False)
DELIVERY = ErrorMapping("together delivery", lambda body: ErrorBody())


class Together:
    """Together as a provider of pictures."""

    base_url = "https://api.together.ai/v1"
    options = Options
    probe = Probe("/models")

    def __init__(self, credentials: Credentials, http: Http) -> None:
        key = (credentials.api_key or "").strip()
        self.configured = bool(key)
        self._http = http
        base = credentials.base_url.rstrip("/").removesuffix("/v1")  # the vendor's own tools take both forms
        self._url = URL(base + "/v1/images/generations")
        self._links = Downloader(http, base, DOMAIN)
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    async def aclose(self) -> None:
        """Closes the connections to where images are fetched from."""
        await self._links.aclose()

    def fit_image(self, fitting: Fitting) -> None:
        """Asks for a PNG where the API can't write the format: nothing is lost by it."""
        if fitting.get("output_format") == ImageFormat.IMAGE_FORMAT_WEBP:
            fitting.replace("output_format", ImageFormat.IMAGE_FORMAT_PNG, "png or jpeg")

    async def image(self, job: Job) -> AsyncGenerator[Event, None]:
        """Draws a picture; see JobMethod. The vendor tells of no progress but the end.

        Raises:
            PomeloError: by the map in `failures`.
        """
        body = to_json(request(job))
        answer = await self._http.whole(self._url, self._headers, body, DIALECT, most=ANSWER_MOST)
        try:
            picture = result(await self._picture(answer))
        except PomeloError as error:
            error.replay = Replay.NEVER
            raise
        if job.stream and (event := ProgressEvents().event(1)):
            yield event
        yield picture

    async def _picture(self, answer: Any) -> bytes:
        """The bytes of the image in an answer, which may have a link in place of base64.

        Raises:
            PomeloError: provider_failed where there is none; what an `error` in its place means; by the map.
        """
        try:
            if "data" not in answer and answer.get("error"):
                raise from_error_body(answer, DIALECT)
            image = answer["data"][0]
            encoded, link = image.get("b64_json"), image.get("url")
        except (AttributeError, IndexError, KeyError, TypeError):
            raise malformed_response("an answer of another shape") from None
        if encoded is None and link is not None:
            return await self._links.fetch(link, DELIVERY)
        return from_base64(encoded)


def request(job: Job) -> dict[str, Any]:
    """The request body for an image job."""
    given: ImageInput = job.input
    route = job.route
    body: dict[str, Any] = {"model": route.model, "prompt": given.prompt, **sides(given, route)}
    body |= numbers(given, _NUMBERS)
    body["n"] = 1
    body["response_format"] = "base64"
    body["output_format"] = FORMATS[given.output_format]
    return body
