"""`pomelo run`: runs one task on a server, and writes text to the terminal and media to a file."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli.output import Output, check_out, note_result
from pomelo.cli.terminal import Ca, Config, FailureError, Key, Progress, Target, task_type_name
from pomelo.output_file import is_special

if TYPE_CHECKING:
    from pomelo.gen.v1.media_pb2 import Media, MediaSource
    from pomelo.gen.v1.model_service_pb2 import Model
    from pomelo.gen.v1.task_pb2 import TaskSpec
    from pomelo.gen.v1.task_service_pb2 import TaskOptions
    from pomelo.service import MediaService

_MAX_INLINE_AUDIO = 3 * 1024 * 1024
"""Bytes of audio that are sent in the task; larger audio is uploaded first."""

_CHUNK_SIZE = 256 * 1024

_FORMATS_BY_EXTENSION = {"jpg": "jpeg", "ogg": "opus"}
"""The formats of files whose extension is not the name of their format."""


def run(
    text: Annotated[
        str | None,
        typer.Argument(help="The prompt or the text to speak. Default, or with -: what is piped to stdin."),
    ] = None,
    model: Annotated[
        str, typer.Option("-m", "--model", metavar="MODEL", help="A model, from pomelo models.")
    ] = "gpt-4",
    file: Annotated[
        Path | None, typer.Option("-f", "--file", metavar="FILE", help="The audio, or a file with the text.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="The output file; - is stdout. Default for media: its id."
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print output as it arrives. Default: on a terminal."),
    ] = None,
    voice: Annotated[str, typer.Option(metavar="NAME", help="The voice of speech.")] = "adam",
    param: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--param",
            metavar="NAME=VALUE",
            help="Another field of the task, such as max_tokens=50 or output_format=webp; may be repeated.",
        ),
    ] = None,
    target: Target = None,
    ca: Ca = None,
    key: Key = None,
    config: Config = None,
) -> None:
    """Run one task; text is printed, media go to a file."""
    from pomelo.cli.client import find_key, new_call, open_client
    from pomelo.server.remote import open_remote
    from pomelo.service import get_task_model
    from pomelo.settings import load

    settings = load(config)
    check_out(out)
    api_key = find_key(settings, key)
    if stream is None:
        stream = sys.stdout.isatty() or sys.stderr.isatty()

    async def run_task() -> None:
        async with open_client(open_remote, settings, target, ca) as services:
            with Progress() as progress:
                found = await get_task_model(services.models, model, new_call(api_key))
                max_inline = min(_MAX_INLINE_AUDIO, settings.inline_limit)
                spec, options, large_audio = _make_task(found, text, file, voice, param or [], max_inline)
                _fit_format(getattr(spec, spec.WhichOneof("input") or ""), out)
                with Output(found, options, out) as output:
                    if large_audio is not None and file is not None:
                        chunks = _chunks(file, progress)
                        media = await services.media.upload_media("", chunks, new_call(api_key))
                        large_audio.media_id = media.id
                    progress.show("Working …")
                    if stream and output.is_streamed:
                        async with services.tasks.stream_task(spec, options, new_call(api_key)) as events:
                            result = await output.write_stream(events, progress)
                    else:
                        result = await services.tasks.run_task(spec, options, new_call(api_key))
                        progress.clear()
                    await output.write_result(result, partial(_download, services.media, api_key))
                note_result(result)

    asyncio.run(run_task())


# --- the request


def _make_task(
    model: Model, text: str | None, file: Path | None, voice: str, params: list[str], max_inline: int
) -> tuple[TaskSpec, TaskOptions, MediaSource | None]:
    """Returns the task, how to answer, and the task's audio if that has to be uploaded: if it has more than
    `max_inline` bytes."""
    from pomelo.gen.v1.media_pb2 import MEDIA_DELIVERY_INLINE
    from pomelo.gen.v1.task_pb2 import TaskSpec
    from pomelo.gen.v1.task_service_pb2 import TaskOptions
    from pomelo.gen.v1.text_pb2 import ROLE_USER

    spec, options = TaskSpec(model=model.id), TaskOptions(delivery=MEDIA_DELIVERY_INLINE)
    input_name = task_type_name(model.task_type).replace("-", "_")
    if input_name not in spec.DESCRIPTOR.fields_by_name:
        raise FailureError(f"{model.id} does tasks of a type that this command does not know. Upgrade Pomelo")
    task_input = getattr(spec, input_name)
    task_input.SetInParent()
    large_audio: MediaSource | None = None
    # A copy, because protobuf's own mapping fails for text that is not UTF-8.
    fields = dict(task_input.DESCRIPTOR.fields_by_name)
    if "voice" in fields:
        task_input.voice = voice
    if "audio" in fields:
        if file is None or text is not None:
            raise FailureError(f"{model.id} takes audio: give --file and no text")
        if not is_special(file) and file.stat().st_size <= max_inline:
            task_input.audio.data = file.read_bytes()
        else:
            large_audio = task_input.audio
    else:
        text = _read_text(text, file, model.id)
        if "messages" in fields:
            task_input.messages.add(role=ROLE_USER).content.add(text=text)
        else:
            setattr(task_input, "prompt" if "prompt" in fields else "text", text)
    owners = dict.fromkeys(fields, task_input) | {"user": spec, "metadata": spec, "delivery": options}
    for param in params:
        name, equals, value = param.partition("=")
        if not equals:
            raise FailureError(f"--param {param}: write NAME=VALUE")
        if name not in owners:
            raise FailureError(f"--param {name}: there is no such field. Fields: {', '.join(sorted(owners))}")
        _set_field(owners[name], name, value)
    return spec, options, large_audio


def _fit_format(task_input: Any, out: str | None) -> None:
    """Sets the output format of a task to that of the extension of its file, unless the user names a format.

    Raises:
        FailureError: the named format is not that of the extension.
    """
    from pomelo.audio_formats import AUDIO_FORMATS, OUTPUT_FORMATS
    from pomelo.protobuf.enums import enum_names

    field = task_input.DESCRIPTOR.fields_by_name.get("output_format")
    if field is None or out is None:
        return
    if field.enum_type is not None:
        names = enum_names(field.enum_type)
        formats = {name: name for name in names.values()}
    else:
        names = {name: audio.codec for name, audio in AUDIO_FORMATS.items()}
        formats = {codec: name for name, codec in names.items()} | dict(OUTPUT_FORMATS)
    extension = Path(out).suffix[1:].lower()
    expected = _FORMATS_BY_EXTENSION.get(extension, extension)
    named = names.get(task_input.output_format, expected)
    if expected not in formats:
        return
    if named != expected:
        raise FailureError(f"--out {out}: output_format is {named}. Change one of them, or leave it out")
    if not task_input.output_format:
        _set_field(task_input, "output_format", formats[expected])


def _read_text(text: str | None, file: Path | None, model: str) -> str:
    if text is None and file is None and sys.stdin is not None and not sys.stdin.isatty():
        text = _read_stdin(model) or None
    if (text is None) == (file is None):
        raise FailureError(f"{model} takes a text: give one of TEXT, - for stdin, or --file")
    if file is None:
        return _read_stdin(model) if text == "-" else text or ""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise _not_text(file, model) from None


def _read_stdin(model: str) -> str:
    try:
        return TextIOWrapper(sys.stdin.buffer, "utf-8-sig").read()
    except UnicodeDecodeError:
        raise _not_text("stdin", model) from None


def _not_text(source: Path | str, model: str) -> FailureError:
    return FailureError(f"{source} is not text, and {model} takes only text")


async def _chunks(file: Path, progress: Progress) -> AsyncIterator[bytes]:
    sent = 0
    with file.open("rb", buffering=0) as source:
        size = os.fstat(source.fileno()).st_size  # 0 for a pipe
        while chunk := source.read(_CHUNK_SIZE):
            progress.show(f"Uploading … {min(sent / size, 1):.0%}" if size else "Uploading …")
            yield chunk
            sent += len(chunk)


async def _download(service: MediaService, api_key: str, media: Media) -> AsyncIterator[bytes]:
    from pomelo.cli.client import new_call

    async with service.download_media(media.id, "", new_call(api_key)) as (_, chunks):
        async for chunk in chunks:
            yield chunk


def _set_field(message: Any, name: str, text: str) -> None:
    """Sets a field from text, the short name of an enum value, or JSON.

    Raises:
        FailureError: the value is not one of the field's type.
    """
    from google.protobuf.json_format import ParseDict, ParseError

    field = message.DESCRIPTOR.fields_by_name[name]
    value: Any = text
    if field.enum_type is not None:
        value = _enum_name(field, text)
    elif field.type != field.TYPE_STRING or field.is_repeated:
        with suppress(ValueError):  # text, for a list of texts; other types are refused below
            value = json.loads(text)
        if field.type == field.TYPE_STRING and not isinstance(value, list | str):
            value = text  # one that looks like a number, such as 5
        if field.is_repeated and not isinstance(value, list | dict):
            value = [value]
    message.ClearField(name)
    try:
        ParseDict({name: value}, message)
    except ParseError:
        raise FailureError(f"--param {name}: {text!r} is not a value of this field") from None


def _enum_name(field: Any, text: str) -> str:
    from pomelo.protobuf.enums import enum_names, enum_prefix

    names = enum_names(field.enum_type).values()
    if text.lower() not in names:
        raise FailureError(f"--param {field.name}: {text!r} is not one of {', '.join(names)}")
    return enum_prefix(field.enum_type) + text.upper()
