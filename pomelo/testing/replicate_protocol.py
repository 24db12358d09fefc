"""A fake of Replicate's predictions for FLUX schnell, from the vendor's HTTP API and the model's schema: most
tests script a `Prediction`.

It is strict: it refuses a field that the schema does not have, and a key that is sent to the delivery.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from pomelo.testing.bfl_protocol import DELIVERY_FAULTS, delivered
from pomelo.testing.broken import BODY, forbidden_link
from pomelo.testing.checks import Check, declared, flag, one_of, text, whole
from pomelo.testing.images import make_image
from pomelo.testing.reply import Received, Reply, Script, VendorFaults, VendorProtocol, json_reply

PREFIX = "/replicate"
MODEL = "black-forest-labs/flux-schnell"
ORDERS = f"{PREFIX}/v1/models/{MODEL}/predictions"
PREDICTIONS = PREFIX + "/v1/predictions/"
DELIVERY = PREFIX + "/delivery/"

_PREFER = re.compile(r"wait(=([1-9]|[1-5][0-9]|60))?")
_ids = count(1)


def prediction(state: str, **more: Any) -> Script:
    """Return the state of a prediction, such as prediction("processing")."""

    def script(received: Received) -> Reply:
        task = received.path.removeprefix(PREDICTIONS) if received.method == "GET" else "p0"
        urls = {"get": f"http://{received.headers['Host']}{PREDICTIONS}{task}"}
        return json_reply({**_body(state, task), "urls": urls, **more})

    return script


def error_reply(
    code: int,
    detail: str = "It can't be done",
    fields: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return a refusal with the vendor's error body; `fields` are the invalid fields of the input."""
    body: dict[str, Any] = {"title": "Refused", "detail": detail, "status": code}
    if fields:
        body["invalid_fields"] = [
            {"type": "invalid", "field": f"input.{name}", "description": "It can't be taken"}
            for name in fields
        ]
    return json_reply(body, code, headers)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A script for a whole prediction: accepts the order, answers polls, delivers the image, and cancels.

    Without `polls`, the reply to the order has the output already, as is usual with `Prefer: wait`. Otherwise
    each of them answers one poll before the output is there; with `done` False it never is. `output` replaces
    the URL of this server's file; `delivery` are the replies to downloads, in place of an image of the
    requested format. `order` is merged into the reply to the order.
    """

    polls: Sequence[Script] = ()
    done: bool = True
    delivery: Sequence[Script] = ()
    output: Any = None
    order: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, received: Received) -> Reply:
        if received.path != ORDERS:
            return error_reply(404, "Not found")
        task = f"p{next(_ids)}"
        base = f"http://{received.headers['Host']}"
        extension = received.body["input"].get("output_format") or "webp"
        file_format = "jpeg" if extension == "jpg" else extension
        file = f"{DELIVERY}{task}/out-0.{extension}"
        urls = {"get": f"{base}{PREDICTIONS}{task}", "cancel": f"{base}{PREDICTIONS}{task}/cancel"}
        output = [base + file] if self.output is None else self.output
        finished = _body("succeeded", task) | {"output": output, "urls": urls}
        polls = [*self.polls, *((json_reply(finished),) if self.done else ())]
        files = self.delivery or (delivered(make_image(file_format), f"image/{file_format}"),)
        answer = _body("starting", task) | {"urls": urls} if self.polls else finished
        cancelled = json_reply(_body("canceled", task) | {"urls": urls})
        follow = {PREDICTIONS + task: polls, f"{PREDICTIONS}{task}/cancel": (cancelled,), file: files}
        return replace(json_reply(answer | dict(self.order), 201), follow=follow)


def refused(received: Received, api_key: str | None) -> Reply | None:
    """Return the vendor's refusal of an invalid request; None for a valid one. Without `api_key`, any key is
    valid."""
    scheme, _, key = received.headers.get("Authorization", "").partition(" ")
    if received.path.startswith(DELIVERY):
        return error_reply(400, "A file takes no key") if key else None
    if scheme not in ("Bearer", "Token") or not key or (api_key is not None and key != api_key):
        return error_reply(401, "You did not pass a valid authentication token")
    if received.path.startswith(PREDICTIONS):
        method = "POST" if received.path.endswith("/cancel") else "GET"
        return None if received.method == method else error_reply(405, "Method not allowed")
    if received.path != ORDERS:
        return error_reply(404, "The requested resource could not be found.")
    if received.method != "POST":
        return error_reply(405, "Method not allowed")
    if received.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
        return error_reply(415, "Send JSON")
    if not _PREFER.fullmatch(received.headers.get("Prefer", "wait")):
        return error_reply(422, "Prefer is wait, or wait=n for at most 60 seconds")
    if not isinstance(received.body, dict) or not isinstance(received.body.get("input"), dict):
        return error_reply(422, "input is required", ("",))
    if set(received.body) - {"input", "webhook", "webhook_events_filter", "stream"}:
        return error_reply(422, "There is another field than input")
    problem = declared(received.body["input"], _FIELDS, (), required=("prompt",))
    return None if problem is None else error_reply(422, problem.message, (problem.param or "",))


def _body(status: str, task: str = "p0") -> dict[str, Any]:
    return {
        "id": task,
        "model": MODEL,
        "version": "hidden",
        "input": {},
        "logs": "",
        "output": None,
        "data_removed": False,
        "error": None,
        "status": status,
        "created_at": "2026-11-22T10:00:00.000Z",
        "metrics": {},
        "urls": {},
    }


_FIELDS: Mapping[str, Check] = {
    "prompt": text(1),
    "aspect_ratio": one_of("1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"),
    "num_outputs": whole(1, 4),
    "num_inference_steps": whole(1, 4),
    "seed": whole(-(2**63), 2**63 - 1),
    "output_format": one_of("webp", "jpg", "png"),
    "output_quality": whole(0, 100),
    "disable_safety_checker": flag,
    "go_fast": flag,
    "megapixels": one_of("1", "0.25"),
}


def _foreign_polling_link(received: Received) -> Reply:
    urls = {"get": forbidden_link(received)}
    return Prediction(polls=(prediction("starting"),), order={"urls": urls})(received)


_IMAGE = VendorFaults(
    {
        "an error with 200": prediction("failed", error=BODY),
        "out of money": error_reply(402, f"Insufficient credit. {BODY}"),
        "too many concurrent tasks": error_reply(429, f"Request was throttled. {BODY}"),
        "unknown key": error_reply(401, f"Unauthenticated. {BODY}"),
        "unknown model": error_reply(404, f"The requested resource could not be found. {BODY}"),
        "against the policy": Prediction(
            polls=(prediction("failed", error=f"NSFW content detected. {BODY}"),), done=False
        ),
        "an invalid value": error_reply(422, BODY, ("seed",)),
        "failed afterwards": Prediction(polls=(prediction("failed", error=BODY),), done=False),
        "lost": Prediction(polls=(error_reply(404, f"Not found. {BODY}"),), done=False),
        "failing polls": Prediction(polls=(error_reply(500, BODY),), done=False),
        "a private link": lambda received: Prediction(output=[forbidden_link(received)])(received),
        "a foreign polling link": _foreign_polling_link,
        "an invalid link": Prediction(output=[7]),
        **{name: Prediction(delivery=(reply,)) for name, reply in DELIVERY_FAULTS.items()},
    },
    {"too long": "the vendor documents no maximum length"},
)

PROTOCOL = VendorProtocol(
    "replicate",
    lambda received: received.path.startswith(PREFIX + "/"),
    refused,
    Prediction(),
    error_reply,
    {"image": _IMAGE},
)
