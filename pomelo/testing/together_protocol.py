"""A fake of Together's images, from the vendor's published API description: most tests script an `Image`.

It is strict: it refuses a field that the description does not have.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing.broken import BODY
from pomelo.testing.checks import Check, Problem, access_refusal, declared, flag, number, one_of, text, whole
from pomelo.testing.images import make_image
from pomelo.testing.reply import Received, Reply, Step, VendorFaults, VendorProtocol, json_reply

PREFIX = "/together"
PATH = PREFIX + "/v1/images/generations"


@dataclass(frozen=True, slots=True)
class Image:
    """A script that answers with `data`, or with an image of the requested format.

    The steps of `before` are sent before the head, those of `middle` in the middle of the body.
    """

    data: bytes | None = None
    before: tuple[Step, ...] = ()
    middle: tuple[Step, ...] = ()

    def __call__(self, received: Received) -> Reply:
        data = self.data
        if data is None:
            data = make_image(received.body.get("output_format") or "jpeg")
        item: dict[str, Any] = {"index": 0, "type": "b64_json", "b64_json": b64encode(data).decode()}
        if received.body.get("response_format") != "base64":
            item = {"index": 0, "type": "url", "url": "https://api.together.ai/imgproxy/T1"}
        answer = {"id": "o-T1", "model": received.body["model"], "object": "list", "data": [item]}
        body = json.dumps(answer).encode()
        half = len(body) // 2
        steps = (body[:half], *self.middle, body[half:])
        return Reply(headers={"Content-Type": "application/json"}, before=self.before, steps=steps)


def error_reply(
    status: int,
    error_type: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    message: str = "It can't be done",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return a refusal with the vendor's error body; `error_type` is its `type`."""
    error = {"message": message, "type": error_type, "param": param, "code": code}
    return json_reply({"id": "o-T1", "error": error}, status, headers)


def refused(received: Received, api_key: str | None) -> Reply | None:
    """Return the vendor's refusal of an invalid request; None for a valid one. Without `api_key`, any key is
    valid."""
    if (refusal := access_refusal(received, PATH, api_key)) is not None:
        return error_reply(refusal.status, code=refusal.code, message=refusal.message)
    if (problem := declared(received.body, _FIELDS, (), required=("model", "prompt"))) is not None:
        return error_reply(400, param=problem.param, message=problem.message)
    if "schnell" in received.body["model"] and received.body.get("steps", 1) > 4:
        return error_reply(400, param="steps", message="This model takes 1 to 4 steps")
    return None


def _list(name: str, value: Any) -> Problem | None:
    return None if isinstance(value, list) else Problem("invalid_type", name, f"{name} must be a list")


_FIELDS: Mapping[str, Check] = {
    "model": text(1),
    "prompt": text(1),
    "width": whole(1, 4096),
    "height": whole(1, 4096),
    "steps": whole(1, 100),
    "n": whole(1, 4),
    "seed": whole(-(2**63), 2**63 - 1),
    "negative_prompt": text(),
    "guidance_scale": number(0, 100),
    "response_format": one_of("base64", "url"),
    "output_format": one_of("jpeg", "png"),
    "disable_safety_checker": flag,
    "image_url": text(1),
    "image_loras": _list,
    "reference_images": _list,
}

_NO_ORDER = "the image is in the response: nothing is ordered, polled for or downloaded"
_WITHOUT_ORDERS = (
    "failed afterwards", "lost", "failing polls", "a private link", "a foreign polling link",
    "an invalid link", "not delivered", "delivered in part", "delivered oversize",
)  # fmt: skip
_IMAGE = VendorFaults(
    {
        "an error with 200": error_reply(200, "strange", message=BODY),
        "out of money": error_reply(402, code="insufficient_credits", message=BODY),
        "too many concurrent tasks": error_reply(429, code="rate_limit", message=BODY),
        "unknown key": error_reply(401, code="invalid_api_key", message=BODY),
        "unknown model": error_reply(404, code="model_not_available", message=BODY),
        "against the policy": error_reply(400, code="content_policy_violation", message=BODY),
        "an invalid value": error_reply(400, param="steps", message=BODY),
        "not an image": Image(f"<html>{BODY}</html>".encode()),
        "an image without its end": Image(make_image("png")[:-1]),
    },
    {"too long": "the vendor documents no maximum length", **dict.fromkeys(_WITHOUT_ORDERS, _NO_ORDER)},
)

PROTOCOL = VendorProtocol(
    "together",
    lambda received: received.path.startswith(PREFIX + "/"),
    refused,
    Image(),
    lambda status, message: error_reply(status, message=message),
    {"image": _IMAGE},
)
