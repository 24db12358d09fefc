"""`POST /v1/images/generations`: runs an image task in the form of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from gateway import sse
from gateway.errors import error_body
from gateway.openai.parameters import IMAGES, Parameters
from gateway.parsing.task import Translation, read_task
from gateway.request import Request
from gateway.responses import Response, json_response
from gateway.state import Gateway
from gateway.types.base import Link, render_media
from gateway.types.fields import check_text
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType
from pomelo.service import Visit

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")

_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
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


async def create_image(gateway: Gateway, request: Request, call: Call, visit: Visit) -> Response | None:
    """Runs an image task and sends its result: JSON or server-sent events.

    Raises:
        PomeloError: any error of the table.
    """
    parameters = _ImageParameters(call)
    translation = Translation(TaskType.TASK_TYPE_IMAGE, parameters.to_fields)
    parsed = await read_task(gateway, request, call, visit, translation)
    parsed.spec.user = parameters.user
    tasks = gateway.services.tasks
    try:
        if parsed.stream:
            parsed.options.delivery = MediaDelivery.MEDIA_DELIVERY_INLINE
            await sse.stream_task(
                request,
                call,
                tasks,
                parsed.spec,
                parsed.options,
                parameters.stream_format(gateway.link),
                keep_alive=gateway.options.keep_alive,
            )
            return None
        result = await tasks.run_task(parsed.spec, parsed.options, call)
        images = b",".join([render_media(image, gateway.link) for image in result.image.images])
        return json_response(call, b'{"created":%d,"data":[%b]}' % (result.create_time.seconds, images))
    except PomeloError as error:
        raise await visit.refuse_task(error) from None


class _ImageParameters(Parameters):
    """The parameters of one request. `user` is the caller's user, `size` the size that the provider is asked
    for, `auto` if its model decides."""

    def __init__(self, call: Call) -> None:
        super().__init__(call, IMAGES)
        self.user = ""
        self.size = "auto"
        self._sides: tuple[str, str] = ("", "")

    def to_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        self.check_names(body)
        n = body.pop("n", None)
        if n not in (None, 1) or n is True:
            raise invalid("n", "1")
        for name in ("user", "safety_identifier"):
            if (value := body.pop(name, None)) is not None:
                self.user = check_text(name, value) or self.user
        self.leave_out(body, _NO_EFFECT)
        size = body.pop("size", None)
        if size is not None and size != "auto":
            sides = _SIZE.fullmatch(check_text("size", size))
            if sides is None:
                raise invalid("size", "auto, or the width and height in pixels, such as 1024x1024")
            self.size = size
            self._sides = (sides[1], sides[2])
            body["width"], body["height"] = map(int, self._sides)
        return body

    def rename_adjusted(self, adjusted: dict[str, str]) -> dict[str, str]:
        if "width" in adjusted or "height" in adjusted:
            width, height = self._sides
            width, height = adjusted.pop("width", width), adjusted.pop("height", height)
            self.size = f"{width}x{height}" if width and height else "auto"
            adjusted["size"] = self.size
        return adjusted

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

        return sse.StreamFormat(
            lambda started: None,
            {},
            render_last,
            lambda _, error, request: sse.encode_event(error_body(error, request)),
        )
