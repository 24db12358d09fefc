"""Checks the events of a provider against the contract of `JobMethod`."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from pomelo.catalog.reported_cost import microdollars
from pomelo.gen.v1.image_pb2 import ImageOutput
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import Role, TextOutput, ToolCallDelta
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event

MAX_CHUNK_BYTES = 64 * 1024
MAX_TOKENS = 10**9


class EventChecker:
    """Checks one response of a task type, whole or streamed. With `needs_usage` False, it may end without
    usage, because the vendor's count of tokens is impossible."""

    def __init__(self, task_type: str, *, stream: bool, needs_usage: bool = True) -> None:
        self._task_type = task_type
        self._stream = stream
        self._needs_usage = needs_usage
        self._progress = -1.0
        self._tool_calls = 0
        self.events = 0
        self.complete = False
        """Whether the events so far look like a complete response. Events of audio can't show that."""
        self.delivered = 0
        """Bytes of output so far: of the text, the audio or the image."""
        self.problems: list[str] = []

    def add(self, event: Event) -> None:
        """Check the next event."""
        if self.complete:
            self._report("an event was yielded after the last one")
        self.events += 1
        which = event.WhichOneof("event")
        if self._task_type == "text" and which == "text_delta":
            self._text_delta(event.text_delta.text)
        elif self._task_type == "text" and which == "tool_call_delta":
            self._tool_call_delta(event.tool_call_delta)
        elif self._task_type in ("text_to_speech", "speech_to_speech"):
            self._expect(which, "audio_chunk")
            self._audio(event)
        elif self._task_type == "image" and which == "image_progress":
            self._image_progress(event.image_progress.progress)
        else:
            self._expect(which, "completed")
            self._completed(event.completed)

    def end(self) -> None:
        """Check the end of a response that did not fail."""
        if not self.events:
            self._report("a response without any event ends without an error")
        elif self._task_type in ("text_to_speech", "speech_to_speech"):
            self.complete = True
        elif not self.complete:
            self._report("the response ends without its last event, and without an error")

    def check_early_usage(self, usage: Usage | None) -> None:
        """Check the count of the input that a response reported before its end, if it did."""
        if usage is not None:
            self._usage(usage)

    def check_cost(self, cost: Any, expected: int | float | Decimal) -> None:
        """Check the cost in US dollars that a response reported."""
        try:
            micros = microdollars(cost)
        except ValueError as error:
            self._report(f"it reports an invalid cost: {error}")
            return
        if micros != microdollars(expected):
            self._report(f"it reports a cost of {cost} US dollars, and should report {expected}")

    def fail(self) -> None:
        """Check a response that ended in an error."""
        if self.complete:
            self._report("a response looked complete before it failed")
        if self.events and self._task_type in ("text", "speech_to_text") and not self._stream:
            self._report("a whole response yielded an event before it failed")

    def _text_delta(self, text: str) -> None:
        self.delivered += len(text.encode())
        if not self._stream:
            self._report("a whole response has more than one event")

    def _tool_call_delta(self, piece: ToolCallDelta) -> None:
        self._text_delta(piece.name + piece.arguments_json)
        if piece.index == self._tool_calls:
            self._tool_calls += 1
            if not (piece.id and piece.name):
                self._report("the first piece of a tool call has no id or no name")
        elif not 0 <= piece.index < self._tool_calls:
            self._report("tool calls are not numbered from 0 without gaps")
        elif piece.id or piece.name:
            self._report("a later piece of a tool call has an id or a name")

    def _audio(self, event: Event) -> None:
        chunk = event.audio_chunk
        self.delivered += len(chunk.data)
        if not 0 < len(chunk.data) <= MAX_CHUNK_BYTES:
            self._report(f"a chunk of audio has {len(chunk.data)} bytes")
        if bool(chunk.content_type) != (self.events == 1):
            self._report("the first chunk of audio, and no other, must have the content_type")

    def _image_progress(self, progress: float) -> None:
        if not self._stream:
            self._report("a whole response has a progress event")
        if not self._progress < progress <= 1:
            self._report("the progress does not grow, or is not between 0 and 1")
        self._progress = progress

    def _completed(self, result: TaskResult) -> None:
        self.complete = True
        output = {"text": "text", "image": "image"}.get(self._task_type, "transcription")
        self._expect(result.WhichOneof("output"), output)
        if output == "text":
            self._text(result.text)
            if result.HasField("usage"):
                self._usage(result.usage)
            elif self._needs_usage:
                self._report("the result has no usage")
        elif output == "image":
            self._images(result.image)
        else:
            self.delivered += len(result.transcription.text.encode())

    def _text(self, text: TextOutput) -> None:
        if not text.finish_reason:
            self._report("the result has no finish_reason")
        message = text.message
        for part in message.content:
            generated = part.text or part.tool_call.name + part.tool_call.arguments_json
            self.delivered += len(generated.encode())
        if text.HasField("message") and message.role != Role.ROLE_ASSISTANT:
            self._report("the message of the result must have the role assistant")
        if not all(part.HasField("text") or part.HasField("tool_call") for part in message.content):
            self._report("the message of the result must have nothing but text and tool calls")

    def _images(self, output: ImageOutput) -> None:
        images = output.images
        if len(images) != 1 or not images[0].data or not images[0].content_type.startswith("image/"):
            self._report("a result must have one image, with data and content_type")
        self.delivered += sum(len(image.data) for image in images)

    def _usage(self, usage: Usage) -> None:
        parts_and_wholes = (
            (usage.cached_input_tokens + usage.cache_write_input_tokens, usage.input_tokens),
            (usage.cache_write_1h_input_tokens, usage.cache_write_input_tokens),
            (usage.reasoning_tokens, usage.output_tokens),
        )
        if not all(0 <= count <= MAX_TOKENS for _, count in usage.ListFields()):
            self._report("an impossible count of tokens is passed on")
        elif any(part > whole for part, whole in parts_and_wholes):
            self._report("the usage does not add up")

    def _expect(self, actual: str | None, expected: str) -> None:
        if actual != expected:
            self._report(f"it yielded {actual} instead of {expected}")

    def _report(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
