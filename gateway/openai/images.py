"""`POST /v1/images/generations`: runs an image task in the form of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic_core import to_json

from gateway import sse
from gateway.openai.parameters import Parameters, Values
from gateway.parsing.task import TaskRequest
from gateway.request import Request
from gateway.responses import Response, json_response
from gateway.state import Gateway
from gateway.types.base import Link, render_media
from gateway.types.fields import check_text
from gateway.types.image import render_images
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")

DEFAULTS: Values = {"n": (1,)}

NO_EFFECT: Values = {
    "quality": ("auto", "standard"),
    "style": ("vivid",),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "output_compression": (100,),
    "partial_images": (0,),
}

_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Images have a price, but no tokens; SDKs require the counts."""


def _render(result: TaskResult, link: Link) -> bytes:
    return render_images(b'{"created":%d' % result.create_time.seconds, result, link)


class ImageParameters(Parameters):
    """The parameters of one request for an image. `size` is the one that the provider is asked for, `auto`
    if its model decides."""

    task_type = TaskType.TASK_TYPE_IMAGE
    names: ClassVar[Mapping[str, str]] = {"width": "size", "height": "size"}

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.size = "auto"
        self._sides: tuple[str, str] = ("", "")

    def to_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        self.take_only(body, DEFAULTS)
        self.take_user(body)
        self.leave_out(body, NO_EFFECT)
        size = body.pop("size", None)
        if size is not None and size != "auto":
            sides = _SIZE.fullmatch(check_text("size", size))
            if sides is None:
                raise invalid("size", "auto, or the width and height in pixels, such as 1024x1024")
            self.size = size
            self._sides = (sides[1], sides[2])
            body["width"], body["height"] = map(int, self._sides)
        return body

    def complete(self, task: TaskRequest) -> None:
        super().complete(task)
        if task.stream:
            task.options.delivery = MediaDelivery.MEDIA_DELIVERY_INLINE

    async def run(self, gateway: Gateway, request: Request, call: Call, task: TaskRequest) -> Response | None:
        result = await gateway.services.tasks.run_task(task.spec, task.options, call)
        return json_response(call, await task.task_format.render(result, _render, result, gateway.link))

    def rename_adjusted(self, adjusted: Mapping[str, str]) -> dict[str, str]:
        renamed = dict(adjusted)
        if "width" in renamed or "height" in renamed:
            width, height = self._sides
            width, height = renamed.pop("width", width), renamed.pop("height", height)
            self.size = f"{width}x{height}" if width and height else "auto"
            renamed["size"] = self.size
        return super().rename_adjusted(renamed)

    def renamed(self, error: PomeloError) -> PomeloError:
        if error.field in ("width", "height") and "expected" in error.values:
            # The range is that of one side.
            return invalid("size", f"WIDTHxHEIGHT; the {error.field} must be {error.values['expected']}")
        return super().renamed(error)

    def stream_format(self, link: Link) -> sse.StreamFormat:
        """Returns the format of a stream: one event with the image."""

        def render_last(_: Any, result: TaskResult) -> bytes:
            image = result.image.images[0]
            members = {
                "type": "image_generation.completed",
                "created_at": result.create_time.seconds,
                "output_format": image.content_type.removeprefix("image/"),
                "size": self.size,
                "quality": "auto",
                "background": "auto",
                "usage": _USAGE,
            }
            # Without a search for characters to escape in megabytes of base64.
            event = to_json(members)[:-1] + b"," + render_media(image, link)[1:]
            return sse.encode_event(event) + sse.DONE

        return sse.StreamFormat(lambda started: None, {}, render_last, self.render_error)
