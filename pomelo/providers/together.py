"""Together: one request, whose response contains the image or a link to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import to_json
from yarl import URL

from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.providers.base import Event, Job, Options, Probe
from pomelo.providers.credentials import Credentials
from pomelo.providers.errors import never_retried
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.downloads import MAX_FILE_BYTES, Downloader, from_base64
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.parsing import pick, pick_text
from pomelo.providers.http.vendor import Vendor
from pomelo.providers.images import (
    FORMATS,
    ProgressEvents,
    contract_names,
    fetch_image,
    image_result,
    image_size,
    renamed_fields,
)

MAX_RESPONSE_BYTES = MAX_FILE_BYTES * 4 // 3 + 64 * 1024
"""The largest image as base64, and the JSON around it."""

_NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance_scale", "seed": "seed"}
"""The contract's name of a parameter -> the vendor's."""

_CONTRACT_NAMES = contract_names(_NAMES)

_MEANINGS = {
    "content_policy_violation": "content_policy_violation",
    "content_filter": "content_policy_violation",
    "rate_limit": "provider_unavailable",
    "rate_limit_exceeded": "provider_unavailable",
    "insufficient_quota": "provider_failed",
    "insufficient_credits": "provider_failed",
    "invalid_api_key": "provider_failed",
}


def _read_error_body(body: Any) -> ErrorBody:
    error = pick(body, "error")
    codes = (pick_text(error, "code"), pick_text(error, "type"))
    return ErrorBody(codes, _CONTRACT_NAMES.get(pick_text(error, "param")))


ERROR_MAPPING = ErrorMapping("together", _read_error_body, _MEANINGS, replays=False)


class Together(Vendor):
    base_url = "https://api.together.ai/v1"
    options = Options
    probe = Probe("/models")

    def __init__(self, credentials: Credentials, http: Http) -> None:
        super().__init__(credentials, http)
        base = self._base.removesuffix("/v1")  # the vendor's own tools accept both forms
        self._url = URL(base + "/v1/images/generations")
        self._downloader = Downloader(http, base, "together.ai")

    async def aclose(self) -> None:
        await self._downloader.aclose()

    def fit_image(self, fitting: Fitting) -> None:
        """Request a PNG if the API does not support the format: it is lossless."""
        if fitting.get("output_format") == ImageFormat.IMAGE_FORMAT_WEBP:
            fitting.replace("output_format", ImageFormat.IMAGE_FORMAT_PNG, "png or jpeg")

    async def image(self, job: Job[ImageInput]) -> AsyncGenerator[Event, None]:
        """As `complete_image`. The vendor reports no progress, so only 1 is."""
        result = await self.complete_image(job)
        if event := ProgressEvents(job.stream).event(1):
            yield event
        yield result

    async def complete_image(self, job: Job[ImageInput]) -> Event:
        """Generate an image.

        Raises:
            UpstreamError: by the error map; without a retry once the vendor has responded.
        """
        response = await self._http.request_json(
            self._url,
            self._json_headers,
            to_json(request(job)),
            ERROR_MAPPING,
            max_bytes=MAX_RESPONSE_BYTES,
        )
        with never_retried():
            return image_result(await self._image(response))

    async def _image(self, response: Any) -> bytes:
        """The image in a response, which may contain a link instead of base64.

        Raises:
            UpstreamError: provider_failed if it has none; the mapped error of an `error` in it.
        """
        try:
            if "data" not in response and response.get("error"):
                raise from_error_body(response, ERROR_MAPPING)
            image = response["data"][0]
            encoded, link = image.get("b64_json"), image.get("url")
        except (AttributeError, IndexError, KeyError, TypeError):
            raise malformed_response("a response of another shape") from None
        if encoded is None and link is not None:
            return await fetch_image(self._downloader, link)
        return from_base64(encoded)


def request(job: Job[ImageInput]) -> dict[str, Any]:
    image, route = job.input, job.route
    body: dict[str, Any] = {"model": route.model, "prompt": image.prompt, **image_size(image, route)}
    body |= renamed_fields(image, _NAMES)
    body["n"] = 1
    body["response_format"] = "base64"
    body["output_format"] = FORMATS[image.output_format]
    return body
