"""`POST /api/v1/task`: runs a task and responds with JSON, server-sent events or raw media."""

from __future__ import annotations

import time
from dataclasses import replace

from gateway import sse
from gateway.media import send_file
from gateway.parsing.task import TaskRequest, read_task
from gateway.queries import check_no_parameters
from gateway.request import Request, weight
from gateway.responses import Response, ResponseStream, json_response, response_headers
from gateway.state import Gateway
from gateway.types import render_result
from gateway.types.base import TaskFormat
from pomelo.call import DEFAULT_TIMEOUT, Call, report_adjustments
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.service import Visit

_JSON_RANGES = frozenset({"*/*", "application/*", "application/json"})


async def run_task(gateway: Gateway, request: Request, call: Call, visit: Visit) -> Response | None:
    """Runs a task and sends its result: JSON, server-sent events, or raw media.

    Raises:
        PomeloError: any error of the table.
    """
    if "?" in request.target:  # saves most requests the call
        await check_no_parameters(request, visit)
    parsed = await read_task(gateway, request, call, visit)
    try:
        if parsed.stream:
            await sse.stream_task(gateway, request, call, visit, parsed, sse.task_stream(gateway.link))
            return None
        accept = request.headers.get("Accept")
        media_range = raw_media_range(accept, parsed.task_format) if accept is not None else None
        if media_range is not None:
            return await send_raw(gateway, request, call, parsed, media_range)
        result = await gateway.services.tasks.run_task(parsed.spec, parsed.options, call)
        body = await parsed.task_format.render(result, render_result, result, gateway.link)
        return json_response(call, body)
    except PomeloError as error:
        raise await visit.refuse_task(error) from None


def raw_media_range(accept: str, task_format: TaskFormat) -> str | None:
    """Returns the media range, such as image/webp, if `Accept` asks for raw media; None: it asks for JSON.

    Of the ranges that the task can be sent in, the one with the greatest weight decides, or the first of
    several. Another type of image or audio asks for raw media only if nothing else that is listed can be
    sent.
    """
    if accept == "*/*" or accept == "application/json" or not task_format.media_range:
        return None
    unavailable = None
    for item in sorted(accept.split(","), key=weight, reverse=True):
        name = item.split(";", 1)[0].strip().lower()
        if not weight(item):
            break
        if name in _JSON_RANGES:
            return None
        if name in task_format.output_formats or name == f"{task_format.media_range}*":
            return name
        if unavailable is None and name.startswith(task_format.media_range):
            unavailable = name
    return unavailable


async def send_raw(
    gateway: Gateway, request: Request, call: Call, parsed: TaskRequest, media_range: str = ""
) -> Response | None:
    """Runs the task and sends its media, audio as it arrives; stores nothing but an image that is too large
    to be in a result.

    `media_range` decides the output format if the task leaves it open. After the first byte, an error
    resets the connection, so that the response can't look complete.

    Raises:
        PomeloError: any error of the table, also after the first byte.
    """
    task_format, task_input = parsed.task_format, parsed.input
    parsed.options.delivery = MediaDelivery.MEDIA_DELIVERY_INLINE
    output_format = task_format.output_formats.get(media_range)
    if output_format and not task_input.output_format:
        task_input.output_format = output_format
    response: ResponseStream | None = None
    result = None
    async with gateway.services.tasks.stream_task(parsed.spec, parsed.options, call) as events:
        async for event in events:
            event_type = event.WhichOneof("event")
            if event_type == "audio_chunk":
                chunk = event.audio_chunk
                if response is None:
                    headers = response_headers(call, Content_Type=chunk.content_type)
                    response = ResponseStream(request, headers)
                if response.push(chunk.data):
                    await response.drain()
            elif event_type == "started":
                report_adjustments(call, event.started.adjustments)
            elif event_type == "completed":
                result = event.completed
    if result is None:
        raise ValueError("the stream ended without its last event")
    if task_format.raw_media is not None:
        media = task_format.raw_media(result)
        headers = response_headers(call, Content_Type=media.content_type)
        if data := media.data:  # a copy each time
            return Response(headers, data)
        # What is charged is delivered, although the call's deadline may pass.
        reading = replace(call, deadline=time.monotonic() + DEFAULT_TIMEOUT)
        try:
            await send_file(gateway, request, reading, media.media.id, headers)
        except PomeloError:
            if request.answered:
                raise
            return json_response(call, render_result(result, gateway.link))
    elif response is not None:
        await response.finish()
    else:
        raise PomeloError("provider_failed")
    return None
