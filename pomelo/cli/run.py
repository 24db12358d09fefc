"""`pomelo run`: runs one task on a server, and writes text to the terminal and media to a file."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from io import SEEK_END, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli.sink import Sink
from pomelo.cli.terminal import Ca, Config, FailureError, Key, Progress, Target, print_line, task_type_name

if TYPE_CHECKING:
    from pomelo.gen.v1.media_pb2 import MediaSource
    from pomelo.gen.v1.model_service_pb2 import Model
    from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
    from pomelo.gen.v1.task_service_pb2 import TaskOptions

_MAX_INLINE_AUDIO = 3 * 1024 * 1024
"""Bytes of audio that are sent in the task; larger audio is uploaded first."""

_CHUNK_SIZE = 256 * 1024


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
    _check_out(out)
    api_key = find_key(settings, key)
    if stream is None:
        stream = sys.stdout.isatty() or sys.stderr.isatty()

    async def run_task() -> None:
        async with open_client(open_remote, settings, target, ca) as services:
            with Progress() as progress:
                found = await get_task_model(services.models, model, new_call(api_key))
                spec, options, large_audio = _make_task(found, text, file, voice, param or [])
                if large_audio is not None and file is not None:
                    chunks = _chunks(file, progress)
                    media = await services.media.upload_media("", chunks, new_call(api_key))
                    large_audio.media_id = media.id
                progress.show("Working …")
                if stream:
                    async with services.tasks.stream_task(spec, options, new_call(api_key)) as events:
                        await _stream(events, out, progress)
                else:
                    result = await services.tasks.run_task(spec, options, new_call(api_key))
                    progress.clear()
                    _write_result(result, out)

    asyncio.run(run_task())


# --- the request


def _make_task(
    model: Model, text: str | None, file: Path | None, voice: str, params: list[str]
) -> tuple[TaskSpec, TaskOptions, MediaSource | None]:
    """Returns the task, how to answer, and the task's audio if that has to be uploaded."""
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
        if file.stat().st_size <= _MAX_INLINE_AUDIO:
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
    with file.open("rb") as source:
        size = source.seek(0, SEEK_END)
        source.seek(0)
        while chunk := source.read(_CHUNK_SIZE):
            progress.show(f"Uploading … {sent / max(size, sent, 1):.0%}")
            yield chunk
            sent += len(chunk)


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


# --- the output


def _check_out(out: str | None) -> None:
    """Refuses a path that can't be written, before the task costs anything."""
    if out is None or out == "-":
        return
    path = Path(out)
    if path.is_dir():
        raise FailureError(f"--out {out}: this is a directory. Name a file")
    if not path.parent.is_dir():
        raise FailureError(f"--out {out}: there is no directory {path.parent}")


async def _stream(events: AsyncIterator[TaskEvent], out: str | None, progress: Progress) -> None:
    """Writes a stream as it arrives. A file gets its name at the end of the stream."""
    started: Any = None
    sink: Sink | None = None
    completed: TaskResult | None = None
    calls: list[dict[str, str]] = []
    with ExitStack() as output:
        async for event in events:
            match event.WhichOneof("event"):
                case "started":
                    started = event.started
                case "text_delta":
                    if sink is None:
                        progress.clear()
                        sink = output.enter_context(_text_sink(out))
                    sink.write_text(event.text_delta.text)
                case "tool_call_delta":
                    piece = event.tool_call_delta
                    if piece.index == len(calls):
                        calls.append({"id": piece.id, "name": piece.name, "arguments": ""})
                    calls[piece.index]["arguments"] += piece.arguments_json
                case "audio_chunk":
                    if sink is None:
                        path = _media_path(out, started.id, event.audio_chunk.content_type)
                        sink = output.enter_context(Sink(path))
                    sink.write(event.audio_chunk.data)
                    progress.show(f"Received {sink.size:,} bytes")
                case "image_progress":
                    progress.show(f"Generating … {event.image_progress.progress:.0%}")
                case "completed":
                    completed = event.completed
        if completed is None:
            raise FailureError("The server ended the stream before the task was complete. Try again")
        progress.clear()
        if calls:
            lines = [] if sink is None else [""]  # the text before them ends its line
            sink = sink or output.enter_context(_text_sink(out))
            sink.write_text("\n".join(lines + list(map(json.dumps, calls))))
    if sink is None:
        _write_result(completed, out)
    else:
        _note_result(completed)


def _write_result(result: TaskResult, out: str | None) -> None:
    output = result.WhichOneof("output")
    match output:
        case "text":
            parts = result.text.message.content
            text = "".join([part.text for part in parts])
            lines = [text] if text or not parts else []
            for call in [part.tool_call for part in parts if part.HasField("tool_call")]:
                values = {"id": call.id, "name": call.name, "arguments": call.arguments_json}
                lines.append(json.dumps(values))
            _write_output("\n".join(lines), _text_sink(out))
        case "transcription":
            _write_output(result.transcription.text, _text_sink(out))
        case "image":
            _write_media(result.image.images[0], result.id, out)
        case "speech":
            _write_media(result.speech, result.id, out)
        case str():
            _write_output(str(getattr(result, output)), _text_sink(out))
    _note_result(result)


def _write_media(output: Any, task_id: str, out: str | None) -> None:
    if output.media.url:
        print_line(output.media.url)
    if output.data:
        _write_output(output.data, Sink(_media_path(out, task_id, output.content_type)))


def _write_output(data: bytes | str, sink: Sink) -> None:
    with sink:
        if isinstance(data, str):
            sink.write_text(data)
        else:
            sink.write(data)


def _text_sink(out: str | None) -> Sink:
    return Sink(None, end_line=True) if out is None or out == "-" else Sink(Path(out))


def _media_path(out: str | None, task_id: str, content_type: str) -> Path | None:
    """Returns the path of a media file, None for stdout."""
    from pomelo.media.content_types import EXTENSIONS

    if out is not None:
        return None if out == "-" else Path(out)
    extensions = {**EXTENSIONS, "audio/pcm": "pcm"}
    return Path(f"{task_id}.{extensions.get(content_type.partition(';')[0], 'bin')}")


def _note_result(result: TaskResult) -> None:
    from pomelo.gen.v1.text_pb2 import FINISH_REASON_CONTENT_FILTER, FINISH_REASON_LENGTH

    if result.text.finish_reason == FINISH_REASON_LENGTH:
        typer.echo("(The text was truncated at max_tokens.)", err=True)
    elif result.text.finish_reason == FINISH_REASON_CONTENT_FILTER:
        typer.echo("(The provider's content filter ended the text.)", err=True)
    adjusted = [f"{one.field}={one.used}" if one.used else f"no {one.field}" for one in result.adjustments]
    if adjusted:
        typer.echo(f"(Adjusted to what the model takes: {', '.join(adjusted)}.)", err=True)
