"""Black Forest Labs: an image is ordered, polled for, and downloaded before its link expires.

It reads one key of a route: `safety_tolerance`, which is sent unchanged (default 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any

from pydantic import Field
from yarl import URL

from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.providers.base import Job, Options, Probe
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, from_error_body
from pomelo.providers.http.parsing import pick, pick_list, pick_text
from pomelo.providers.http.polling import UNKNOWN
from pomelo.providers.images import FORMATS, OrderedImages, contract_names, image_size, renamed_fields

SAFETY_TOLERANCE = 2
"""The vendor's own default, of 0 (strict) to 6."""

_MEANINGS = {
    "request moderated": "content_policy_violation",
    "content moderated": "content_policy_violation",
    "error": "provider_failed",
    "failed": "provider_failed",
}
"""The states of a task that ended without an image."""

_DETAILS = frozenset((UNKNOWN, "request moderated", "content moderated"))
"""States that the text of an error may be; any other text is for humans."""

_CREDIT_DOLLARS = Decimal("0.01")

_NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance", "seed": "seed"}
"""The contract's name of a parameter -> the vendor's."""

_CONTRACT_NAMES = contract_names(_NAMES)


def _read_error_body(body: Any) -> ErrorBody:
    """A refusal has a text or a list of errors as `detail`; a task has a `status`, also in an error."""
    detail = pick_text(body, "detail").lower()
    codes = (pick_text(body, "status").lower(), detail if detail in _DETAILS else "")
    names = (pick_text(error, "loc", 1) for error in pick_list(body, "detail"))
    return ErrorBody(codes, _CONTRACT_NAMES.get(next(filter(None, names), "")))


class BFLOptions(Options):
    safety_tolerance: Annotated[int, Field(ge=0, le=6)] = SAFETY_TOLERANCE


class BFL(OrderedImages):
    """Black Forest Labs as a provider of images."""

    base_url = "https://api.bfl.ai"
    domain = "bfl.ai"  # the vendor's responses name one of several clusters
    options = BFLOptions
    probe = Probe("/v1/credits", "x-key", "", {"Accept": "application/json"})
    errors = ErrorMapping("bfl", _read_error_body, _MEANINGS, replays=False)
    ready = "ready"

    def _order(self, job: Job[ImageInput]) -> tuple[str, Mapping[str, str], dict[str, Any]]:
        return f"/v1/{job.route.model}", self._json_headers, request(job)

    def _polling_url(self, order: Any, job: Job[ImageInput]) -> URL:
        if not isinstance(order, dict) or "polling_url" not in order:
            raise from_error_body(order, self.errors)
        url = self._downloader.api_url(order["polling_url"])
        job.report.cost = _dollars(order.get("cost"))
        return url

    def _image_link(self, task: dict[str, Any]) -> object:
        return pick(task, "result", "sample")


def _dollars(cost: Any) -> Any:
    """The vendor's credits in US dollars. What is not a number is returned unchanged, and not billed."""
    return Decimal(str(cost)) * _CREDIT_DOLLARS if type(cost) in (int, float) else cost


def request(job: Job[ImageInput]) -> dict[str, Any]:
    image, route = job.input, job.route
    body: dict[str, Any] = {"prompt": image.prompt, **image_size(image, route)}
    body |= renamed_fields(image, _NAMES)
    body["safety_tolerance"] = route.options.get("safety_tolerance", SAFETY_TOLERANCE)
    body["output_format"] = FORMATS[image.output_format]
    return body
