"""`pomelo run`: one task on a running server; text to the terminal, media to a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from pomelo.cli.safe_text import visible_lines
from pomelo.cli.terminal import Ca, Config, FailureError, Key, Progress, Target, say

if TYPE_CHECKING:
    from pomelo.gen.v1.task_pb2 import Task, TaskResult

_INLINE = 3 * 1024 * 1024
"""Bytes of sound that ride in the task; more is uploaded first, in pieces."""

_PIECE = 256 * 1024
_ENDINGS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "audio/mpeg": "mp3",
    "audio/wav": "wav",
    "audio/ogg": "ogg",
    "audio/basic": "ulaw",
    "audio/x-alaw-basic": "alaw",
}


def run(
    text: Annotated[
        str | None, typer.Argument(help="What to ask, draw or say; - reads it from stdin.")
    ] = None,
    model: Annotated[
        str, typer.Option("-m", "--model", metavar="MODEL", help="See: pomelo models.")
    ] = "gpt-4",
    file: Annotated[
        Path | None, typer.Option("-f", "--file", metavar="F", help="The sound, or a file with the text.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o", "--out", metavar="F", help="Where to write; - is stdout. Default for media: its id."
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Piece by piece, as it comes. Default: on a terminal."),
    ] = None,
    voice: Annotated[str, typer.Option(metavar="NAME", help="Who speaks.")] = "adam",
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
    from pomelo.cli.client import bearer, server
    from pomelo.gen.v1.model_service_pb2 import GetModelRequest
    from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
    from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
    from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
    from pomelo.settings import load

    settings = load(config)
    _check_out(out)
    metadata = bearer(settings, key)
    if stream is None:
        stream = sys.stdout.isatty() or sys.stderr.isatty()
    with server(settings, target, ca) as channel, Progress() as progress:
        kind = ModelServiceStub(channel).GetModel(GetModelRequest(name=model), metadata=metadata)
        task = _task(channel, metadata, kind.model, text, file, voice, param or [])
        stub = TaskServiceStub(channel)
        progress.show("Working …")
        if stream:
            _stream(stub.StreamTask(StreamTaskRequest(task=task), metadata=metadata), out, progress)
        else:
            result = stub.RunTask(RunTaskRequest(task=task), metadata=metadata).result
            _finish(result, out, progress)


# --- what is asked


def _task(
    channel: Any,
    metadata: list[tuple[str, str]],
    model: Any,
    text: str | None,
    file: Path | None,
    voice: str,
    params: list[str],
) -> Task:
    from pomelo.gen.v1.media_pb2 import RESPONSE_FORMAT_B64_JSON
    from pomelo.gen.v1.task_pb2 import Task, TaskType
    from pomelo.gen.v1.text_pb2 import ROLE_USER

    kind = TaskType.Name(model.task_type).removeprefix("TASK_TYPE_").lower()
    task = Task(model=model.name)
    given = getattr(task, kind)
    given.SetInParent()
    fields = given.DESCRIPTOR.fields_by_name
    if "response_format" in fields:
        given.response_format = RESPONSE_FORMAT_B64_JSON
    if "voice" in fields:
        given.voice = voice
    if "audio" in fields:
        if file is None or text is not None:
            raise FailureError(f"{model.name} takes a sound: give --file and no text")
        _audio(given.audio, channel, metadata, file)
    else:
        words = _words(text, file, model.name)
        match kind:
            case "text":
                given.messages.add(role=ROLE_USER, content=words)
            case "image":
                given.prompt = words
            case _:
                given.text = words
    for param in params:
        name, equals, value = param.partition("=")
        if not equals:
            raise FailureError(f"--param {param}: write NAME=VALUE")
        set_field(given, name, value)
    return task


def _words(text: str | None, file: Path | None, model: str) -> str:
    if (text is None) == (file is None):
        raise FailureError(f"{model} takes a text: give TEXT, - for stdin, or --file; one of them")
    try:
        if file is not None:
            return file.read_text()
        return sys.stdin.read() if text == "-" else text or ""
    except UnicodeDecodeError:
        raise FailureError(f"{file or 'stdin'} holds no text, and {model} takes text alone") from None


def _audio(audio: Any, channel: Any, metadata: list[tuple[str, str]], file: Path) -> None:
    from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
    from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub

    if file.stat().st_size <= _INLINE:
        audio.data = file.read_bytes()
        return

    def pieces(source: BinaryIO) -> Iterator[UploadMediaRequest]:
        yield UploadMediaRequest(content_type="")
        while piece := source.read(_PIECE):
            yield UploadMediaRequest(chunk=piece)

    with file.open("rb") as source:
        answer = MediaServiceStub(channel).UploadMedia(pieces(source), metadata=metadata)
    audio.media_id = answer.media.media_id


def set_field(message: Any, name: str, text: str) -> None:
    """Sets a field of an input from what was typed: a text, the short name of an enum, or JSON.

    Raises:
        FailureError: there is no such field, or the value is none of its.
    """
    from google.protobuf.json_format import ParseDict, ParseError

    fields = message.DESCRIPTOR.fields_by_name
    field = fields.get(name)
    if field is None:
        raise FailureError(f"--param {name}: there is no such field. There are: {', '.join(sorted(fields))}")
    value: Any = text
    if field.enum_type is not None:
        value = _enum(field, text)
    elif field.type != field.TYPE_STRING or field.is_repeated:
        with suppress(ValueError):  # one of several texts; anything else is refused below
            value = json.loads(text)
        if field.is_repeated and not isinstance(value, list):
            value = [value]
    message.ClearField(name)
    try:
        ParseDict({name: value}, message)
    except ParseError:
        raise FailureError(f"--param {name}: {text!r} is no value of it") from None


def _enum(field: Any, text: str) -> str:
    names: list[str] = [value.name for value in field.enum_type.values]
    prefix = names[0].removesuffix("UNSPECIFIED")
    name = prefix + text.upper()
    if name not in names:
        short = ", ".join(n.removeprefix(prefix).lower() for n in names[1:])
        raise FailureError(f"--param {field.name}: {text!r} is none of {short}")
    return name


# --- what comes


def _check_out(out: str | None) -> None:
    """Refuses, before anything is paid for, a place where no file can be.

    Raises:
        FailureError: it is one.
    """
    if out in (None, "-"):
        return
    path = Path(out or "")
    if path.is_dir():
        raise FailureError(f"--out {out or '(nothing)'}: this is a directory. Name a file")
    if not path.parent.is_dir():
        raise FailureError(f"--out {out}: there is no directory {path.parent}")


def _stream(events: Iterable[Any], out: str | None, progress: Progress) -> None:
    """Writes a stream as it comes. A file gets its name when it is whole."""
    first: Any = None
    sink: _Sink | None = None
    finish_reason = 0
    try:
        for event in events:
            match event.WhichOneof("event"):
                case "started":
                    first = event.started
                case "text_delta":
                    if sink is None:
                        progress.clear()
                        sink = _text_sink(out)
                    sink.write_text(event.text_delta.content)
                    finish_reason = event.text_delta.finish_reason
                case "audio_chunk":
                    if sink is None:
                        sink = _Sink(_place(out, first.id, event.audio_chunk.content_type))
                    sink.write(event.audio_chunk.data)
                    progress.show(f"Received {sink.size:,} bytes")
                case "image_progress":
                    progress.show(f"Drawing … {event.image_progress.progress:.0%}")
                case "result" if sink is None:
                    _finish(event.result, out, progress)
    except BaseException:
        if sink is not None:
            sink.drop()
        raise
    if sink is not None:
        progress.clear()
        sink.keep()
        _note(finish_reason)
        _note_adjusted(first.adjustments)


def _finish(result: TaskResult, out: str | None, progress: Progress) -> None:
    """Writes a whole answer."""
    progress.clear()
    match result.WhichOneof("output"):
        case "text":
            _put(result.text.content, _text_sink(out))
            _note(result.text.finish_reason)
        case "transcription":
            _put(result.transcription.text, _text_sink(out))
        case "image":
            _medium(result.image.images[0], result.id, out)
        case "speech":
            _medium(result.speech, result.id, out)
    _note_adjusted(result.adjustments)


def _medium(output: Any, task_id: str, out: str | None) -> None:
    if output.media.url:
        say(output.media.url)
    if output.data:
        _put(output.data, _Sink(_place(out, task_id, output.content_type)))


def _text_sink(out: str | None) -> _Sink:
    """Writes a text: to a file or a pipe byte for byte; to a terminal, without control characters. On stdout
    an end of line is added."""
    return _Sink(None, line=True) if out in (None, "-") else _Sink(Path(out or ""))


def _put(data: bytes | str, sink: _Sink) -> None:
    try:
        if isinstance(data, str):
            sink.write_text(data)
        else:
            sink.write(data)
    except BaseException:
        sink.drop()
        raise
    sink.keep()


def _place(out: str | None, task_id: str, content_type: str) -> Path | None:
    """Where media go; None for stdout."""
    if out == "-":
        return None
    if out is not None:
        return Path(out)
    kind = content_type.partition(";")[0]
    return Path(f"{task_id}.{_ENDINGS.get(kind, 'pcm' if kind == 'audio/pcm' else 'bin')}")


def _note(finish_reason: int) -> None:
    from pomelo.gen.v1.text_pb2 import FINISH_REASON_CONTENT_FILTER, FINISH_REASON_LENGTH

    if finish_reason == FINISH_REASON_LENGTH:
        typer.echo("(The text was cut at max_tokens.)", err=True)
    elif finish_reason == FINISH_REASON_CONTENT_FILTER:
        typer.echo("(The provider's filter ended the text.)", err=True)


def _note_adjusted(adjustments: Iterable[Any]) -> None:
    if made := ", ".join(f"{one.field}={one.used}" if one.used else f"no {one.field}" for one in adjustments):
        typer.echo(f"(Adjusted to what the model takes: {made}.)", err=True)


class _Sink:
    """stdout, or a file that has its name once it is whole; then the name is printed.

    Raises:
        OSError: the file can't be written; it bears the name that the user gave.
    """

    def __init__(self, path: Path | None, *, line: bool = False) -> None:
        self._path = path
        self._line = line
        self._part = path
        # A device or a pipe is written to as it is: to rename a file to it would put it away.
        if path is not None and (path.is_file() or not path.exists()):
            self._part = path.with_name(path.name + ".part")
        with self._named():
            self._file: BinaryIO = sys.stdout.buffer if self._part is None else self._part.open("wb")
        self._last = b""
        self.size = 0

    def write_text(self, text: str) -> None:
        """Writes text immediately."""
        self.write((visible_lines(text) if self._file.isatty() else text).encode())

    def write(self, data: bytes) -> None:
        """Writes at once: what has come is seen."""
        with self._named():
            self._file.write(data)
            self._file.flush()
        self._last = data[-1:] or self._last
        self.size += len(data)

    def keep(self) -> None:
        """All has come."""
        if self._part is None or self._path is None:
            self._end_line()
            return
        try:
            with self._named():
                self._file.close()
                if self._part != self._path:
                    self._part.replace(self._path)
        except OSError:
            self.drop()
            raise
        say(str(self._path))

    def drop(self) -> None:
        """It was cut: no file is left that looks whole."""
        if self._part is None:
            self._end_line()
            return
        with suppress(OSError):
            self._file.close()
        if self._part != self._path:
            self._part.unlink(missing_ok=True)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._path is not None:
                error.filename, error.filename2 = str(self._path), None
            raise

    def _end_line(self) -> None:
        """What comes after a text begins on its own line."""
        if self._line and self._last not in (b"", b"\n"):
            self._file.write(b"\n")
            self._file.flush()
