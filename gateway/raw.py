"""Pictures and sound as they are, without JSON around them: what an `Accept` of image/* or audio/* gets.

Called by `gateway.task`. What fails after its first byte is left to `problems.guard`, which breaks the
connection, so that it can't look complete.
"""

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from gateway.reply import headers
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import Task, TaskType
from pomelo.service import TaskService

_RANGES: Mapping[int, str] = {
    TaskType.TASK_TYPE_IMAGE: "image/",
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: "audio/",
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: "audio/",
}
_JSON = frozenset({"*/*", "application/*", "application/json"})


def wanted(accept: str | None, kind: int) -> bool:
    """Whether the bytes themselves are asked for: the first range that the kind can serve decides; weights
    are not looked at."""
    if accept is None or accept == "*/*" or accept == "application/json":
        return False
    own = _RANGES.get(kind)
    if own is None:
        return False
    for item in accept.split(","):
        name = item.split(";", 1)[0].strip().lower()
        if name in _JSON:
            return False
        if name.startswith(own):
            return True
    return False


async def send(
    request: web.Request, call: Call, tasks: TaskService, task: Task, target: Any
) -> web.StreamResponse:
    """Runs `task`, whose input is `target`, and sends its bytes as they come; nothing is kept.

    Raises:
        PomeloError: any row of the table, also after the first byte.
    """
    target.response_format = ResponseFormat.RESPONSE_FORMAT_B64_JSON
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
