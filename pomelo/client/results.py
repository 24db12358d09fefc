"""What tasks return: the protobuf result, and the parts of it that callers use most."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Generic, TypeVar

from pomelo.client.limits import Limits, read_limits, to_credits
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.speech_pb2 import Word
from pomelo.gen.v1.task_pb2 import Adjustment, TaskEvent, TaskResult
from pomelo.gen.v1.text_pb2 import ROLE_ASSISTANT, ContentPart, FinishReason, Message, ToolCall
from pomelo.gen.v1.usage_pb2 import Usage

T = TypeVar("T")
R = TypeVar("R")

_FINISH_REASON = len("FINISH_REASON_")


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """The result of a task. `raw` is the message of the contract; `metadata` are the response's headers, by
    their names in lower case."""

    raw: TaskResult
    metadata: Mapping[str, str]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, model={self.model!r})"  # no content, for logs

    @property
    def id(self) -> str:
        """The id of the task, as in its usage record."""
        return self.raw.id

    @property
    def created(self) -> datetime:
        """When the task was accepted."""
        return self.raw.create_time.ToDatetime(UTC)

    @property
    def model(self) -> str:
        """The model's name as it was requested."""
        return self.raw.model

    @property
    def usage(self) -> Usage:
        """What the task used."""
        return self.raw.usage

    @property
    def cost(self) -> Decimal | None:
        """What the task costs in credits; None: not known. A replayed result has the cost of the first, and
        costs nothing itself."""
        return to_credits(self.raw.cost_micros) if self.raw.HasField("cost_micros") else None

    @property
    def adjustments(self) -> Sequence[Adjustment]:
        """The fields that the model does not support as they were given."""
        return self.raw.adjustments

    @property
    def request_id(self) -> str:
        """The id of the request, for the operator."""
        return self.metadata.get("x-request-id", "")

    @property
    def limits(self) -> Limits:
        """The limits and credits of the account, as this response reports them."""
        return read_limits(self.metadata)

    @property
    def replayed(self) -> bool:
        """Whether it is the stored result of an earlier request with the same idempotency key."""
        return self.metadata.get("idempotent-replayed") == "true"


@dataclass(frozen=True, slots=True, repr=False)
class TextResult(Result):
    """The result of a text task."""

    @property
    def text(self) -> str:
        """The text; empty if the model only called tools."""
        return "".join([part.text for part in self.message.content])

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The model's calls of tools; `arguments` parses those of a call."""
        return [part.tool_call for part in self.message.content if part.HasField("tool_call")]

    @property
    def message(self) -> Message:
        """The model's message. To continue the conversation, append it to the messages of the next task."""
        return self.raw.text.message

    @property
    def finish_reason(self) -> str:
        """Why the model stopped: stop, length, content_filter or tool_calls."""
        reason = self.raw.text.finish_reason
        known = reason in FinishReason.values()
        return FinishReason.Name(reason)[_FINISH_REASON:].lower() if known else ""

    def json(self) -> Any:
        """Parses the text, for tasks with the format json or a schema.

        Raises:
            ValueError: the text is not JSON, for example because `max_tokens` truncated it.
        """
        return json.loads(self.text)


@dataclass(frozen=True, slots=True, repr=False)
class ImageResult(Result):
    """The result of an image task."""

    @property
    def data(self) -> bytes:
        """The file. Empty if only a link was requested, and above 16 MiB: download `media`."""
        return self.raw.image.images[0].data

    @property
    def content_type(self) -> str:
        """The media type of the file, such as image/png."""
        return self.raw.image.images[0].content_type

    @property
    def media(self) -> Media | None:
        """The stored file, with its link; None if it was not stored."""
        image = self.raw.image.images[0]
        return image.media if image.HasField("media") else None


@dataclass(frozen=True, slots=True, repr=False)
class SpeechResult(Result):
    """The result of a speech task."""

    @property
    def data(self) -> bytes:
        """The file. Empty at the end of a stream, if only a link was requested, and above 16 MiB: download
        `media`."""
        return self.raw.speech.data

    @property
    def content_type(self) -> str:
        """The media type of the file, such as audio/mpeg."""
        return self.raw.speech.content_type

    @property
    def media(self) -> Media | None:
        """The stored file, with its link; None if it was not stored."""
        return self.raw.speech.media if self.raw.speech.HasField("media") else None


@dataclass(frozen=True, slots=True, repr=False)
class Transcript(Result):
    """The result of a speech-to-text task."""

    @property
    def text(self) -> str:
        """The whole text."""
        return self.raw.transcription.text

    @property
    def language(self) -> str:
        """The detected language, such as en; empty: unknown."""
        return self.raw.transcription.language_code

    @property
    def words(self) -> Sequence[Word]:
        """Words or characters with their times."""
        return self.raw.transcription.words


class Reader(ABC, Generic[T, R]):
    """Reads the events of one stream: the pieces of its output, and the result at its end."""

    def read(self, event: TaskEvent) -> T | None:
        """Returns the piece in an event; None without one."""
        return None

    @abstractmethod
    def result(self, raw: TaskResult, metadata: Mapping[str, str]) -> R:
        """Returns the result, of a stream or of a whole response."""


class TextReader(Reader[str, TextResult]):
    """Reads a text; its pieces are text."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: dict[int, list[str]] = {}
        """The id, the name and the pieces of the arguments of each tool call, by its index."""

    def read(self, event: TaskEvent) -> str | None:
        if event.HasField("text_delta"):
            self._text.append(event.text_delta.text)
            return event.text_delta.text
        if event.HasField("tool_call_delta"):
            delta = event.tool_call_delta
            self._calls.setdefault(delta.index, [delta.id, delta.name]).append(delta.arguments_json)
        return None

    def result(self, raw: TaskResult, metadata: Mapping[str, str]) -> TextResult:
        if not raw.text.HasField("message"):
            # Without tool calls it has a text, also an empty one: a message without content is refused.
            content = [ContentPart(text="".join(self._text))] if self._text or not self._calls else []
            for _, (call_id, name, *pieces) in sorted(self._calls.items()):
                call = ToolCall(id=call_id, name=name, arguments_json="".join(pieces))
                content.append(ContentPart(tool_call=call))
            raw.text.message.CopyFrom(Message(role=ROLE_ASSISTANT, content=content))
        return TextResult(raw, metadata)


class ImageReader(Reader[float, ImageResult]):
    """Reads an image; its pieces are the progress from 0 to 1."""

    def read(self, event: TaskEvent) -> float | None:
        return event.image_progress.progress if event.HasField("image_progress") else None

    def result(self, raw: TaskResult, metadata: Mapping[str, str]) -> ImageResult:
        return ImageResult(raw, metadata)


class SpeechReader(Reader[bytes, SpeechResult]):
    """Reads speech; its pieces are those of the file."""

    def read(self, event: TaskEvent) -> bytes | None:
        return event.audio_chunk.data if event.HasField("audio_chunk") else None

    def result(self, raw: TaskResult, metadata: Mapping[str, str]) -> SpeechResult:
        return SpeechResult(raw, metadata)


class TranscriptReader(Reader[object, Transcript]):
    """Reads a transcript, which comes whole."""

    def result(self, raw: TaskResult, metadata: Mapping[str, str]) -> Transcript:
        return Transcript(raw, metadata)
