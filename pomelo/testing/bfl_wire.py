"""Black Forest Labs as the vendor's side speaks it: an order, questions about it, and the delivery.

`FaultUpstream` asks `refused` first; what a test scripts is mostly a `Drawing`. The facts are those of the
vendor's documentation and its own client. Strict on purpose: a field that a model does not have is refused,
and so is a key that is sent along to the delivery.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from pomelo.testing.broken import BODY, astray
from pomelo.testing.checks import Check, flag, number, one_of, text, whole
from pomelo.testing.pictures import CONTENT_TYPES, picture
from pomelo.testing.reply import Received, Reply, Script, Step, Stop, Wire, Wording

PREFIX = "/bfl"
ORDERS = PREFIX + "/v1/"
RESULT = PREFIX + "/v1/get_result"
DELIVERY = PREFIX + "/delivery/"

_ids = count(1)
_STATE: Mapping[str, Any] = {"result": None, "details": None, "preview": None}


def status(
    word: str, *, progress: float | None = None, http: int = 200, before: tuple[Step, ...] = (), **more: Any
) -> Script:
    """What the vendor says of a task, such as status("Pending", progress=0.5)."""

    def said(received: Received) -> Reply:
        task = received.query.get("id", "0f3c-0")
        body = {"id": task, "status": word, "progress": progress}
        reply = _json({**_STATE, **body, **more}, http)
        return Reply(reply.status, reply.headers, reply.steps, before)

    return said


def ready(sample: Any) -> Script:
    """The task is done, and its picture is at the URL `sample`."""
    return status("Ready", result={"sample": sample, "prompt": "as it was", "seed": 7, "duration": 1.5})


def moderated(word: str = "Content Moderated") -> Script:
    """The picture was refused; with "Request Moderated" the prompt was."""
    return status(word, details={"Moderation Reasons": ["Safety Filter"]})


def error_reply(
    code: int, detail: Any = "It can't be done", headers: Mapping[str, str] | None = None
) -> Reply:
    """A refusal with the vendor's error body."""
    return _json({"detail": detail}, code, headers)


def invalid(name: str, message: str = "It can't be taken") -> Reply:
    """The refusal of one field of an order."""
    return error_reply(422, [{"loc": ["body", name], "msg": message, "type": "value_error"}])


def _missing(place: str, name: str) -> Reply:
    return error_reply(422, [{"loc": [place, name], "msg": "Field required", "type": "missing"}])


def delivered(data: bytes, content_type: str = "image/png") -> Reply:
    """A file of the delivery."""
    return Reply(headers={"Content-Type": content_type, "Content-Length": str(len(data))}, steps=(data,))


@dataclass(frozen=True, slots=True)
class Drawing:
    """A script for a whole task: takes the order, answers questions about it, and delivers.

    Before the task is ready, `polls` answer one question each; one that says how a task ends belongs at the
    end, with `done` False. `sample` and `polling_url` stand in place of the URLs of this server; `delivery`
    answers downloads one after another, in place of a picture of the asked format. `order` is merged into the
    answer to the order.
    """

    polls: Sequence[Script] = ()
    done: bool = True
    delivery: Sequence[Script] = ()
    sample: Any = None
    polling_url: Any = None
    order: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, received: Received) -> Reply:
        """The reply to an order; to anything else, that nothing is known of it."""
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
        files = self.delivery or (delivered(picture(file_format), CONTENT_TYPES[file_format]),)
        answer: dict[str, Any] = {
            "id": task,
            "polling_url": base + result if self.polling_url is None else self.polling_url,
            "cost": 4.0,
            "input_mp": 0.0,
            "output_mp": 0.79,
        }
        taken = _json(answer | dict(self.order))
        return Reply(taken.status, taken.headers, taken.steps, follow={result: polls, file: files})


def refused(received: Received, api_key: str | None) -> Reply | None:
    """The vendor's refusal of a request that it would not take; None for one that it would.

    With `api_key` None any key will do, but orders and questions need one.
    """
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
        return None if received.query.get("id") else _missing("query", "id")
    fields = _MODELS.get(received.path.removeprefix(ORDERS))
    if fields is None:
        return error_reply(404, "Not Found")
    if received.method != "POST":
        return error_reply(405, "Method Not Allowed")
    if received.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
        return invalid("body", "JSON is needed")
    if not isinstance(received.body, dict):
        return invalid("body", "It is no object")
    return _faults(received.body, fields)


def _faults(body: Mapping[str, Any], fields: Mapping[str, Check]) -> Reply | None:
    if not body.get("prompt"):
        return invalid("prompt", "Field required")
    for name, value in body.items():
        check = fields.get(name)
        if check is None:
            return invalid(name, "Extra inputs are not permitted")
        if value is not None and (problem := check(name, value)) is not None:
            return invalid(name, problem.message)
        if name in ("width", "height") and value is not None and value % 32:
            return invalid(name, "It must be a multiple of 32")
    return None


def _json(body: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    head = {"Content-Type": "application/json", "x-request-id": "bfl-test-1", **(headers or {})}
    return Reply(code, head, (json.dumps(body).encode(),))


_COMMON: Mapping[str, Check] = {
    "prompt": text(),
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

UNDELIVERED: Mapping[str, Reply] = {
    "expired link": Reply(
        403, {"Content-Type": "application/xml"}, (b"<Error>AuthenticationFailed</Error>",)
    ),
    "cut download": Reply(
        headers={"Content-Type": "image/png", "Content-Length": str(len(picture("png")))},
        steps=(picture("png")[:40], Stop.CLOSE),
    ),
    "oversized download": Reply(
        headers={"Content-Type": "image/png", "Content-Length": str(10**12)},
        steps=(picture("png")[:40], Stop.SILENCE),
    ),
    "not an image": Reply(headers={"Content-Type": "image/png"}, steps=(f"<html>{BODY}</html>".encode(),)),
}
"""Faults of a delivery, whoever delivers."""

_IMAGE = Wording(
    {
        "error with 200": status("Error", details={"reason": BODY}),
        "out of money": error_reply(402, f"Insufficient credits. {BODY}"),
        "too many concurrent tasks": error_reply(429, f"Too many active tasks. {BODY}"),
        "unknown key": error_reply(403, f"Not authenticated. {BODY}"),
        "unknown model": error_reply(404, "Not Found"),
        "against the policy": Drawing(polls=(moderated(),), done=False),
        "refused value": invalid("width", BODY),
        "failed later": Drawing(polls=(status("Error", details={"reason": BODY}),), done=False),
        "task lost": Drawing(polls=(error_reply(404, "Task not found"),), done=False),
        "polling fails": Drawing(polls=(error_reply(500, BODY),), done=False),
        "private link": lambda received: Drawing(sample=astray(received))(received),
        "foreign polling link": lambda received: Drawing(polling_url=astray(received))(received),
        "invalid link": Drawing(sample=7),
        **{name: Drawing(delivery=(reply,)) for name, reply in UNDELIVERED.items()},
    },
    {"too long": "the vendor documents no maximum length of a prompt"},
)

WIRE = Wire(
    "bfl",
    lambda received: received.path.startswith(PREFIX + "/"),
    refused,
    Drawing(),
    error_reply,
    {"image": _IMAGE},
)
