"""Pictures and sound as they are, without JSON around them: what an `Accept` of image/* or audio/* gets.

Called by `gateway.task`. What fails after its first byte is left to `problems.guard`, which breaks the
connection, so that it can't look complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from gateway.reply import headers
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import ImageFormat
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import Task, TaskType
from pomelo.service import TaskService

_RANGES: Mapping[int, str] = {
    TaskType.TASK_TYPE_IMAGE: "image/",
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: "audio/",
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: "audio/",
}
_JSON = frozenset({"*/*", "application/*", "application/json"})


_FORMATS: Mapping[str, ImageFormat.ValueType] = {
    "image/png": ImageFormat.IMAGE_FORMAT_PNG,
    "image/jpeg": ImageFormat.IMAGE_FORMAT_JPEG,
    "image/webp": ImageFormat.IMAGE_FORMAT_WEBP,
}
_NEVER = re.compile(r";\s*q=0(?:\.0*)?\s*(?:;|$)", re.IGNORECASE)


def wanted(accept: str | None, kind: int) -> str | None:
    """The media range that asks for the bytes themselves, such as image/webp; None: JSON is wanted.

    The first range that the kind can serve decides; of weights only q=0 is looked at.
    """
    if accept is None or accept == "*/*" or accept == "application/json":
        return None
    own = _RANGES.get(kind)
    if own is None:
        return None
    for item in accept.split(","):
        name = item.split(";", 1)[0].strip().lower()
        if _NEVER.search(item):
            continue
        if name in _JSON:
            return None
        if name.startswith(own):
            return name
    return None


async def send(
    request: web.Request, call: Call, tasks: TaskService, task: Task, target: Any, accepted: str
) -> web.StreamResponse:
    """Runs `task`, whose input is `target`, and sends its bytes as they come; nothing is kept. An `accepted`
    type decides the picture's format where the task leaves it open.

    Raises:
        PomeloError: any row of the table, also after the first byte.
    """
    target.response_format = ResponseFormat.RESPONSE_FORMAT_B64_JSON
    if accepted in _FORMATS and not target.output_format:
        target.output_format = _FORMATS[accepted]
    response: web.StreamResponse | None = None
    picture = None
    done = False
    async with tasks.stream_task(task, call) as events:
        async for event in events:
            which = event.WhichOneof("event")
            if which == "audio_chunk":
                chunk = event.audio_chunk
                if response is None:
                    response = web.StreamResponse(headers=headers(call, Content_Type=chunk.content_type))
                    await response.prepare(request)
                await response.write(chunk.data)
            elif which == "result":
                done = True
                if event.result.WhichOneof("output") == "image":
                    picture = event.result.image.images[0]
    if not done:
        raise ValueError("the stream ended without its result")
    if picture is not None:
        return web.Response(body=picture.data, headers=headers(call, Content_Type=picture.content_type))
    if response is None:
        raise PomeloError("provider_failed")
    await response.write_eof()
    return response
