"""`POST /api/v1/task`: from a request to a task, and from its result to the answer that was asked for.

A row of `gateway.routes`. Translates: what a key may do and what a task takes is for the services to say.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from gateway import body, multipart, raw, render, sse
from gateway.incoming import Incoming
from gateway.reply import json_reply
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.task_pb2 import Task

_UNREAD = 64 * 1024
"""Bytes of a body that are taken in before the key is looked at."""

_WHOLE_BODY = frozenset({"invalid_body", "payload_too_large", "unsupported_media_type"})
_MOST_KINDS = 1024


async def run(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """Answers a task: JSON, server-sent events, or the bytes themselves.

    Raises:
        PomeloError: any row of the table.
    """
    task, target, kind, stream = await _take_in(gateway, request, call)
    tasks = gateway.services.tasks
    if stream:
        return await sse.stream(
            request,
            call,
            tasks,
            task,
            link=gateway.link,
            keep_alive=gateway.options.keep_alive,
        )
    accept = request.headers.get("Accept")
    accepted = raw.wanted(accept, kind) if accept is not None else None
    if accepted is not None:
        return await raw.send(request, call, tasks, task, target, accepted)
    return json_reply(call, render.result(await tasks.run_task(task, call), gateway.link))


async def _take_in(gateway: Gateway, request: web.Request, call: Call) -> tuple[Task, Any, int, bool]:
    # A fault of the body is told only after the key, and one of a field only after the model, was looked
    # at: by the services, which raise if they have something against it.
    values: Mapping[str, Any] = {}
    form = multipart.Form()
    try:
        is_form = _is_form(request)
        if is_form:
            await _read_form(gateway, request, call, form)
            values = form.texts
        else:
            values = await _read_json(gateway, request, call)
        name = body.model_of(values)
        kind = gateway.kinds.get(name)
        if kind is None:
            kind = await _kind_of(gateway, name, call)
        task, target, stream = body.make_task(name, kind, values, form=is_form)
        if kind in body.HEARS:
            if form.audio is not None:
                if not form.audio.media_id:
                    raise invalid("audio", "a file of at least one byte")
                target.audio.media_id = form.audio.media_id
                target.audio.content_type = form.audio.content_type
            elif values.get("audio") is not None:
                await _put_audio(gateway, target, values["audio"], call)
    except PomeloError as fault:
        model = (values or form.texts).get("model")
        if type(model) is str and model and fault.code not in _WHOLE_BODY:
            await gateway.services.models.get_model(model, call)
        else:
            await gateway.services.models.list_models(call)
        raise fault
    return task, target, kind, stream


def _is_form(request: web.Request) -> bool:
    encoding = request.headers.get("Content-Encoding")
    if encoding is not None and encoding.strip().lower() != "identity":
        raise PomeloError("unsupported_media_type", "Send the body without Content-Encoding")
    given = request.headers.get("Content-Type", "")
    if given == "application/json":
        return False
    name = given.split(";", 1)[0].strip().lower()
    if name == "multipart/form-data":
        return True
    if name != "application/json":
        raise PomeloError("unsupported_media_type")
    return False


async def _read_json(gateway: Gateway, request: web.Request, call: Call) -> dict[str, Any]:
    options = gateway.options
    incoming = Incoming(request, call, options.json_limit, options.read_timeout)
    await _refuse_strangers(gateway, incoming.length, call)
    return await body.read_json(incoming, options.json_limit)


async def _refuse_strangers(gateway: Gateway, length: int | None, call: Call) -> None:
    """Looks at the key ahead of a body of `length` bytes, unless it is small: strangers don't get megabytes
    held and parsed."""
    if length is None or length > _UNREAD:
        await gateway.services.models.list_models(call)


async def _read_form(gateway: Gateway, request: web.Request, call: Call, form: multipart.Form) -> None:
    options = gateway.options
    limit = options.upload_limit + options.json_limit
    incoming = Incoming(request, call, limit, options.read_timeout)
    await _refuse_strangers(gateway, incoming.length, call)

    async def kind_of(name: str) -> int:
        return await _kind_of(gateway, name, call)

    await multipart.read_form(
        form,
        request.headers["Content-Type"],
        incoming,
        call=call,
        media=gateway.services.media,
        kind_of=kind_of,
        text_limit=options.json_limit,
        upload_limit=options.upload_limit,
    )


async def _kind_of(gateway: Gateway, name: str, call: Call) -> int:
    # Asked of the service and not of a catalogue: a remote server may know models that nobody here does.
    model = await gateway.services.models.get_model(name, call)
    kinds = gateway.kinds
    if len(kinds) >= _MOST_KINDS:
        kinds.clear()
    kinds[name] = model.task_type
    return model.task_type


async def _put_audio(gateway: Gateway, target: Any, value: Any, call: Call) -> None:
    content_type, data = body.decode_audio(value)
    if len(data) <= gateway.options.inline_limit:
        target.audio.data = data
    else:
        stored = await gateway.services.media.upload_media(content_type, _split(data), call)
        target.audio.media_id = stored.media_id
        content_type = stored.content_type
    target.audio.content_type = content_type


async def _split(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), multipart.PIECE):
        yield data[at : at + multipart.PIECE]
        await asyncio.sleep(0)
