"""Replicate: an image is ordered as a prediction, polled for if necessary, and downloaded.

The models of the FLUX family take an aspect ratio and a number of megapixels instead of a size in pixels, so
the nearest ones are requested.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

from yarl import URL

from pomelo.catalog.catalog import Route
from pomelo.fields import DEFAULT_IMAGE_SIDE
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.providers.base import Job, Options, Probe
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.errors import ErrorBody, ErrorMapping
from pomelo.providers.http.parsing import pick_list, pick_text
from pomelo.providers.images import FORMATS, OrderedImages, contract_names, image_size, renamed_fields

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

_EXPECTED_SIZE = "one side of " + ", ".join(f"{width}x{height}" for width, height in _SIZES)

_MODERATED = "moderated"
_MEANINGS = {
    _MODERATED: "content_policy_violation",
    "failed": "provider_failed",
    "canceled": "provider_failed",
    "aborted": "provider_failed",
}
"""The states of a prediction that ended without an image."""

_MODERATION_WORDS = ("nsfw", "sensitive", "content policy", "(e005)")
"""Words in the text of an error about a refused image: the vendor has no code for it."""

_NAMES = {"num_inference_steps": "num_inference_steps", "guidance_scale": "guidance", "seed": "seed"}
"""The contract's name of a parameter -> the vendor's."""

_CONTRACT_NAMES = contract_names(_NAMES) | {"aspect_ratio": "width", "megapixels": "width"}


def _read_error_body(body: Any) -> ErrorBody:
    """A prediction has a `status` and an `error`; a refusal has the `invalid_fields`, if any."""
    error = pick_text(body, "error").lower()
    if any(word in error for word in _MODERATION_WORDS):
        return ErrorBody((_MODERATED,))
    names = (pick_text(field, "field") for field in pick_list(body, "invalid_fields"))
    name = next(filter(None, names), "").removeprefix("input.")
    return ErrorBody((pick_text(body, "status"),), _CONTRACT_NAMES.get(name))


class Replicate(OrderedImages):
    """Replicate as a provider of images. The vendor reports no progress, so only 0 and 1 are; a prediction
    that was finished in the first response is not polled."""

    base_url = "https://api.replicate.com"
    domain = "replicate.com"  # images are delivered from others
    options = Options
    probe = Probe("/v1/account")
    errors = ErrorMapping("replicate", _read_error_body, _MEANINGS, replays=False)
    ready = "succeeded"

    def fit_image(self, fitting: Fitting) -> None:
        """Replace a size that the models don't generate by the size with the nearest aspect ratio and
        area."""
        width, height = _size(fitting.input, fitting.route)
        if fitting.get("width") is not None or fitting.get("height") is not None:
            fitting.replace("width", width, _EXPECTED_SIZE)
            fitting.replace("height", height, _EXPECTED_SIZE)

    def _order(self, job: Job[ImageInput]) -> tuple[str, Mapping[str, str], dict[str, Any]]:
        path = f"/v1/models/{job.route.model}/predictions"
        # A prediction usually takes a second. The link that cancels it comes after five at most.
        return path, self._json_headers | {"Prefer": "wait=5"}, {"input": request(job)}

    def _polling_url(self, order: Any, job: Job[ImageInput]) -> URL | None:
        return None if self._finished(order) else self._downloader.api_url(pick_text(order, "urls", "get"))

    def _image_link(self, task: dict[str, Any]) -> object:
        output = task.get("output")
        return output[0] if isinstance(output, list) and output else output

    def _cancel_link(self, order: Any) -> str:
        return pick_text(order, "urls", "cancel")


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
    ratio = width / height
    aspect = min(_ASPECTS, key=lambda aspect: abs(log(_ASPECTS[aspect] / ratio)))
    divisor = 1 if width * height >= 500_000 else 2  # half way, as a ratio, from a quarter to one megapixel
    return _ASPECT_SIZES[aspect][0] // divisor, _ASPECT_SIZES[aspect][1] // divisor
