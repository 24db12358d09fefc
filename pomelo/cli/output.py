"""The output of a task: text on stdout, media in a file, or the link of a stored file."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import typer

from pomelo.cli.sink import Sink
from pomelo.cli.terminal import FailureError, Progress, print_line, task_type_name

if TYPE_CHECKING:
    from pomelo.gen.v1.media_pb2 import Media
    from pomelo.gen.v1.model_service_pb2 import Model
    from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
    from pomelo.gen.v1.task_service_pb2 import TaskOptions
    from pomelo.gen.v1.text_pb2 import Message

_MEDIA_TYPES = frozenset({"image", "text-to-speech", "speech-to-speech"})
"""The task types whose output is a file."""


def check_out(out: str | None) -> None:
    """Refuses a path that names no file, before a server is called.

    Raises:
        FailureError: it is a directory, or in none.
    """
    if out is None or out == "-":
        return
    path = Path(out)
    if path.is_dir():
        raise FailureError(f"--out {out}: this is a directory. Name a file")
    if not path.parent.is_dir():
        raise FailureError(f"--out {out}: there is no directory {path.parent}")


class Output:
    """The output of one task. `out` is the file that the user names, or - for stdout; None: text goes to
    stdout, media to a file that is named after the task.

    The file is opened before the task costs anything. As a context manager it ends the output: as complete,
    or after an exception as incomplete.

    Raises:
        FailureError, OSError: the file can't be written.
    """

    def __init__(self, model: Model, options: TaskOptions, out: str | None) -> None:
        from pomelo.gen.v1.media_pb2 import MEDIA_DELIVERY_BOTH, MEDIA_DELIVERY_LINK

        task_type = task_type_name(model.task_type)
        is_media = task_type in _MEDIA_TYPES
        path = None if out is None or out == "-" else Path(out)
        self._has_link = options.delivery in (MEDIA_DELIVERY_LINK, MEDIA_DELIVERY_BOTH)
        self._is_link = is_media and path is None and options.delivery == MEDIA_DELIVERY_LINK
        self._is_unnamed = is_media and out is None and not self._is_link
        self._is_named = out is not None
        self._is_stdout = path is None and not self._is_unnamed
        if self._is_unnamed:
            path = Path(f"pomelo-{secrets.token_hex(8)}")  # until the task has an id
        try:
            self._sink = Sink(path, end_line=not is_media)
        except OSError as error:
            if not self._is_unnamed:
                raise
            raise FailureError(f"{Path.cwd()}: {error.strerror}. Name a file with --out") from None
        self.is_streamed = task_type == "image" or not self._is_link
        """Whether a stream is of use: not if the bytes of speech are not wanted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._sink.__exit__(kind, error, trace)

    async def write_stream(self, events: AsyncIterator[TaskEvent], progress: Progress) -> TaskResult:
        """Writes the text or the audio of a stream as it arrives, and returns the result at its end.

        Raises:
            FailureError: the stream ended too early.
            OSError: the output can't be written.
        """
        sink = self._sink
        completed: TaskResult | None = None
        calls: list[dict[str, str]] = []
        async for event in events:
            match event.WhichOneof("event"):
                case "text_delta":
                    progress.clear()
                    sink.write_text(event.text_delta.text)
                case "tool_call_delta":
                    piece = event.tool_call_delta
                    if piece.index == len(calls):
                        calls.append({"id": piece.id, "name": piece.name, "arguments": ""})
                    calls[piece.index]["arguments"] += piece.arguments_json
                case "audio_chunk":
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
            lines = [""] if sink.size else []  # the text before them ends its line
            sink.write_text("\n".join(lines + list(map(json.dumps, calls))))
        return completed

    async def write_result(
        self, result: TaskResult, download: Callable[[Media], AsyncIterator[bytes]]
    ) -> None:
        """Writes what of a result was not streamed. `download` returns the bytes of a stored file.

        Raises:
            OSError: the output can't be written.
            PomeloError: a stored file can't be read.
        """
        match output := result.WhichOneof("output"):
            case "image":
                await self._write_media(result.image.images[0], result.id, download)
            case "speech":
                await self._write_media(result.speech, result.id, download)
            case str() if self._sink.size:
                pass
            case "text":
                self._sink.write_text(_text_of(result.text.message))
            case "transcription":
                self._sink.write_text(result.transcription.text)
            case str():
                self._sink.write_text(str(getattr(result, output)))

    async def _write_media(
        self, output: Any, task_id: str, download: Callable[[Media], AsyncIterator[bytes]]
    ) -> None:
        media, sink = output.media, self._sink
        if self._has_link and media.url:
            print_line(media.url, err=self._is_stdout and not self._is_link)
        name = _default_name(task_id, output.content_type)
        if self._is_link:
            if output.data and self._is_named:  # without space for a file with a link, the server returns it
                sink.write(output.data)
            elif output.data:
                with Sink(Path(name)) as late:
                    late.write(output.data)
            return
        if self._is_unnamed:
            sink.rename(name)
        if sink.size:
            return
        if output.data:
            sink.write(output.data)
            return
        try:  # it is too large for a response
            async for chunk in download(media):
                sink.write(chunk)
        except BaseException:
            if media.url:
                print_line(f"(The file can be downloaded for an hour: {media.url})", err=True)
            raise


def _text_of(message: Message) -> str:
    """Returns the text of a message, and its tool calls as lines of JSON."""
    parts = message.content
    text = "".join([part.text for part in parts])
    lines = [text] if text or not parts else []
    for call in [part.tool_call for part in parts if part.HasField("tool_call")]:
        lines.append(json.dumps({"id": call.id, "name": call.name, "arguments": call.arguments_json}))
    return "\n".join(lines)


def _default_name(task_id: str, content_type: str) -> str:
    """Returns the name of a media file that the user does not name."""
    from pomelo.media.content_types import EXTENSIONS

    extensions = {**EXTENSIONS, "audio/pcm": "pcm"}
    return f"{task_id}.{extensions.get(content_type.partition(';')[0], 'bin')}"


def note_result(result: TaskResult) -> None:
    """Prints notes about a result on stderr."""
    from pomelo.gen.v1.text_pb2 import FINISH_REASON_CONTENT_FILTER, FINISH_REASON_LENGTH

    if result.text.finish_reason == FINISH_REASON_LENGTH:
        typer.echo("(The text was truncated at max_tokens.)", err=True)
    elif result.text.finish_reason == FINISH_REASON_CONTENT_FILTER:
        typer.echo("(The provider's content filter ended the text.)", err=True)
    adjusted = [f"{one.field}={one.used}" if one.used else f"no {one.field}" for one in result.adjustments]
    if adjusted:
        typer.echo(f"(Adjusted to what the model takes: {', '.join(adjusted)}.)", err=True)
