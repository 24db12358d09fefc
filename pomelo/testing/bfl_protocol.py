"""A fake of Black Forest Labs, from the vendor's documentation and its own client: most tests script a
`Drawing`.

It is strict: it refuses a field that a model does not have, and a key that is sent to the delivery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from pomelo.testing.broken import BODY, forbidden_link
from pomelo.testing.checks import Check, declared, flag, number, one_of, text, whole
from pomelo.testing.images import make_image
from pomelo.testing.reply import Received, Reply, Script, Step, Stop, VendorFaults, VendorProtocol, json_reply

PREFIX = "/bfl"
ORDERS = PREFIX + "/v1/"
RESULT = PREFIX + "/v1/get_result"
DELIVERY = PREFIX + "/delivery/"

_ids = count(1)
_STATE: Mapping[str, Any] = {"result": None, "details": None, "preview": None}


def status(
    word: str, *, progress: float | None = None, http: int = 200, before: tuple[Step, ...] = (), **more: Any
) -> Script:
    """Return the state of a task, such as status("Pending", progress=0.5)."""

    def script(received: Received) -> Reply:
        task = received.query.get("id", "0f3c-0")
        body = {"id": task, "status": word, "progress": progress}
        return replace(json_reply({**_STATE, **body, **more}, http), before=before)

    return script


def ready(sample: Any) -> Script:
    """Return the state of a finished task, whose image is at the URL `sample`."""
    return status("Ready", result={"sample": sample, "prompt": "as it was", "seed": 7, "duration": 1.5})


def moderated(word: str = "Content Moderated") -> Script:
    """Return the state of a task whose image was refused, or with "Request Moderated" its prompt."""
    return status(word, details={"Moderation Reasons": ["Safety Filter"]})


def error_reply(
    code: int, detail: Any = "It can't be done", headers: Mapping[str, str] | None = None
) -> Reply:
    """Return a refusal with the vendor's error body."""
    return json_reply({"detail": detail}, code, {"x-request-id": "bfl-test-1", **(headers or {})})


def invalid(name: str, message: str = "It can't be taken") -> Reply:
    """Return the refusal of one field of an order."""
    return error_reply(422, [{"loc": ["body", name], "msg": message, "type": "value_error"}])


def delivered(data: bytes, content_type: str = "image/png") -> Reply:
    """Return a downloaded file."""
    return Reply(headers={"Content-Type": content_type, "Content-Length": str(len(data))}, steps=(data,))


@dataclass(frozen=True, slots=True)
class Drawing:
    """A script for a whole task: accepts the order, answers polls, and delivers the image.

    Before the task is ready, each of `polls` answers one poll; with `done` False the last of them is the end
    of the task. `sample` and `polling_url` replace the URLs of this server; `delivery` are the replies to
    downloads, in place of an image of the requested format. `order` is merged into the reply to the order.
    """

    polls: Sequence[Script] = ()
    done: bool = True
    delivery: Sequence[Script] = ()
    sample: Any = None
    polling_url: Any = None
    order: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, received: Received) -> Reply:
        if received.method != "POST":
            return error_reply(404, "Task not found")
        task = f"0f3c-{next(_ids)}"
        base = f"http://{received.headers['Host']}"
        file_format = received.body.get("output_format") or "jpeg"
        result = f"{RESULT}?id={task}"
        file = f"{DELIVERY}{task}/sample.{file_format}?se=2026&sig=a%2Bb%2F%3D"
        polls = list(self.polls)
        if self.done:
            polls.append(ready(base + file if self.sample is None else self.sample))
        files = self.delivery or (delivered(make_image(file_format), f"image/{file_format}"),)
        answer: dict[str, Any] = {
            "id": task,
            "polling_url": base + result if self.polling_url is None else self.polling_url,
            "cost": 4.0,
            "input_mp": 0.0,
            "output_mp": 0.79,
        }
        return replace(json_reply(answer | dict(self.order)), follow={result: polls, file: files})


def refused(received: Received, api_key: str | None) -> Reply | None:
    """Return the vendor's refusal of an invalid request; None for a valid one. Without `api_key`, any key is
    valid."""
    key = received.headers.get("x-key")
    if received.path.startswith(DELIVERY):
        if received.method != "GET":
            return error_reply(405, "Method Not Allowed")
        if key is not None or "Authorization" in received.headers:
            return error_reply(400, "A signed link takes no key")
        return None
    if not key or (api_key is not None and key != api_key):
        return error_reply(403, "Not authenticated")
    if received.path == RESULT:
        if received.method != "GET":
            return error_reply(405, "Method Not Allowed")
        if not received.query.get("id"):
            return error_reply(422, [{"loc": ["query", "id"], "msg": "Field required", "type": "missing"}])
        return None
    fields = _MODELS.get(received.path.removeprefix(ORDERS))
    if fields is None:
        return error_reply(404, "Not Found")
    if received.method != "POST":
        return error_reply(405, "Method Not Allowed")
    if received.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
        return invalid("body", "JSON is needed")
    if not isinstance(received.body, dict):
        return invalid("body", "It is no object")
    return _check_fields(received.body, fields)


def _check_fields(body: Mapping[str, Any], fields: Mapping[str, Check]) -> Reply | None:
    if (problem := declared(body, fields, (), required=("prompt",))) is not None:
        return invalid(problem.param or "", problem.message)
    for name in ("width", "height"):
        if (body.get(name) or 0) % 32:
            return invalid(name, "It must be a multiple of 32")
    return None


_COMMON: Mapping[str, Check] = {
    "prompt": text(1),
    "image_prompt": text(),
    "width": whole(256, 1440),
    "height": whole(256, 1440),
    "prompt_upsampling": flag,
    "seed": whole(-(2**63), 2**63 - 1),
    "safety_tolerance": whole(0, 6),
    "output_format": one_of("jpeg", "png", "webp"),
    "webhook_url": text(1, 2083),
    "webhook_secret": text(),
}

_MODELS: Mapping[str, Mapping[str, Check]] = {
    "flux-pro-1.1": _COMMON,
    "flux-dev": {**_COMMON, "steps": whole(1, 50), "guidance": number(1.5, 5)},
    "flux-pro": {
        **_COMMON,
        "steps": whole(1, 50),
        "guidance": number(1.5, 5),
        "interval": number(1, 4),
    },
}

DELIVERY_FAULTS: Mapping[str, Reply] = {
    "not delivered": Reply(
        403, {"Content-Type": "application/xml"}, (b"<Error>AuthenticationFailed</Error>",)
    ),
    "delivered in part": Reply(
        headers={"Content-Type": "image/png", "Content-Length": str(len(make_image("png")))},
        steps=(make_image("png")[:40], Stop.CLOSE),
    ),
    "delivered oversize": Reply(
        headers={"Content-Type": "image/png", "Content-Length": str(10**12)},
        steps=(make_image("png")[:40], Stop.SILENCE),
    ),
    "not an image": Reply(headers={"Content-Type": "image/png"}, steps=(f"<html>{BODY}</html>".encode(),)),
    "an image without its end": delivered(make_image("png")[:-1]),
}
"""Faults of a download, for all vendors."""

_IMAGE = VendorFaults(
    {
        "an error with 200": status("Error", details={"reason": BODY}),
        "out of money": error_reply(402, f"Insufficient credits. {BODY}"),
        "too many concurrent tasks": error_reply(429, f"Too many active tasks. {BODY}"),
        "unknown key": error_reply(403, f"Not authenticated. {BODY}"),
        "unknown model": error_reply(404, "Not Found"),
        "against the policy": Drawing(polls=(moderated(),), done=False),
        "an invalid value": invalid("width", BODY),
        "failed afterwards": Drawing(polls=(status("Error", details={"reason": BODY}),), done=False),
        "lost": Drawing(polls=(error_reply(404, "Task not found"),), done=False),
        "failing polls": Drawing(polls=(error_reply(500, BODY),), done=False),
        "a private link": lambda received: Drawing(sample=forbidden_link(received))(received),
        "a foreign polling link": lambda received: Drawing(polling_url=forbidden_link(received))(received),
        "an invalid link": Drawing(sample=7),
        **{name: Drawing(delivery=(reply,)) for name, reply in DELIVERY_FAULTS.items()},
    },
    {"too long": "the vendor documents no maximum length"},
)

PROTOCOL = VendorProtocol(
    "bfl",
    lambda received: received.path.startswith(PREFIX + "/"),
    refused,
    Drawing(),
    error_reply,
    {"image": _IMAGE},
)
