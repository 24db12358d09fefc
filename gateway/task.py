"""`POST /api/v1/task`: from a request to a task, and from its result to the answer that was asked for.

A row of `gateway.routes`. Translates: what a key may do and what a task takes is for the services to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from aiohttp import web

from gateway import body, multipart, raw, render, sse
from gateway.access import owner_of
from gateway.charset import UTF_8, charset_of
from gateway.fields import check_text, unknown
from gateway.incoming import Incoming
from gateway.reply import json_reply
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.task_pb2 import Task
from pomelo.media import data_uris
from pomelo.service import Visit

_MOST_KINDS = 1024


async def run(gateway: Gateway, request: web.Request, call: Call, visit: Visit) -> web.StreamResponse:
    """Answers a task: JSON, server-sent events, or the bytes themselves.

    Raises:
        PomeloError: any row of the table.
    """
    task, target, kind, stream = await _take_in(gateway, request, call, visit)
    tasks = gateway.services.tasks
    try:
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
    except PomeloError as error:
        raise await visit.refuse_task(error) from None


async def _take_in(
    gateway: Gateway, request: web.Request, call: Call, visit: Visit
) -> tuple[Task, Any, int, bool]:
    if call.header_error is not None:
        raise await visit.refuse(call.header_error)
    values: Mapping[str, Any] = {}
    form = multipart.Form()
    try:
        is_form = _is_form(request)
        if is_form:
            incoming = await _read_form(gateway, request, call, visit, form)
            values = form.texts
            data = b""
            size = sum(map(len, values.values()))
        else:
            incoming = Incoming(request, call, visit, gateway.options.json_limit, gateway.pace)
            data = await body.read_json(incoming)
            size = len(data)
        if size <= body.LARGE:
            if not is_form:
                values = body.parse(data)
            kind = await _kind_of(gateway, values, call)
            task, target, stream = body.make_task(values["model"], kind, values, form=is_form)
        else:
            async with gateway.parsing.body(owner_of(call), size) as steps:
                if not is_form:
                    values = await steps.run(partial(body.parse, data))
                kind = await _kind_of(gateway, values, call)
                make = partial(body.make_task, values["model"], kind, values, form=is_form)
                task, target, stream = await steps.run(make)
            await asyncio.sleep(0)  # yields to other requests: the next steps take time, too
        del data
        if form.audio is not None and kind not in body.TAKES_FILE:
            raise unknown("audio", kind)
        if kind in body.HEARS:
            if form.audio is not None:
                if not form.audio.media_id:
                    raise invalid("audio", "a file of at least one byte")
                target.audio.media_id = form.audio.media_id
                target.audio.content_type = form.audio.content_type
            elif values.get("audio") is not None:
                await _put_audio(gateway, incoming, target, values["audio"], call)
    except PomeloError as fault:
        model = (values or form.texts).get("model")
        # `refuse` returns the error to report: one of the model precedes one of a field.
        raise await visit.refuse(fault, model if type(model) is str else "") from None
    return task, target, kind, stream


def _is_form(request: web.Request) -> bool:
    encoding = request.headers.get("Content-Encoding")
    if encoding is not None and encoding.strip().lower() != "identity":
        raise PomeloError("unsupported_media_type", "Send the body without Content-Encoding")
    given = request.headers.get("Content-Type", "")
    if given == "application/json":
        return False
    name = given.split(";", 1)[0].strip().lower()
    if name not in ("application/json", "multipart/form-data"):
        raise PomeloError("unsupported_media_type")
    if charset_of(given) not in UTF_8:
        raise PomeloError("unsupported_media_type", "Send the body in UTF-8, and with no other charset")
    return name == "multipart/form-data"


async def _read_form(
    gateway: Gateway, request: web.Request, call: Call, visit: Visit, form: multipart.Form
) -> Incoming:
    options = gateway.options
    incoming = Incoming(request, call, visit, options.upload_limit + options.json_limit, gateway.pace)

    async def kind_of(name: str) -> int:
        # Not from the cache, so that no file is accepted for a model that the key may not use.
        return await _ask_kind(gateway, name, call)

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
    return incoming


async def _kind_of(gateway: Gateway, values: Mapping[str, Any], call: Call) -> int:
    """Returns the task type of the model that a body names."""
    name = body.model_of(values)
    known = gateway.kinds.get(name)
    return known if known is not None else await _ask_kind(gateway, name, call)


async def _ask_kind(gateway: Gateway, name: str, call: Call) -> int:
    # Asked of the service and not of a catalogue: a remote server may know models that nobody here does.
    model = await gateway.services.models.get_model(name, call)
    kinds = gateway.kinds
    if len(kinds) >= _MOST_KINDS:
        kinds.clear()
    kinds[name] = model.task_type
    return model.task_type


async def _put_audio(gateway: Gateway, incoming: Incoming, target: Any, value: Any, call: Call) -> None:
    """Puts audio from base64 into the input: inline if it is small, else as an upload."""
    text = check_text("audio", value)
    content_type, start = data_uris.head(text, "audio")
    pieces = data_uris.decode(text, start, "audio")
    size = (len(text) - start) * 3 // 4
    if size <= gateway.options.inline_limit:
        incoming.hold(size)
        target.audio.data = b"".join(pieces)
    else:
        first = next(pieces, b"")
        if first:
            stored = await gateway.services.media.upload_media(content_type, _paced(first, pieces), call)
            target.audio.media_id, content_type = stored.media_id, stored.content_type
    if not target.audio.data and not target.audio.media_id:
        raise invalid("audio", "base64 of at least one byte")
    target.audio.content_type = content_type


async def _paced(first: bytes, rest: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Decodes piece by piece, with other requests between."""
    yield first
    for piece in rest:
        yield piece
        await asyncio.sleep(0)
