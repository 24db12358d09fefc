"""Checks the events of a provider against the contract of `JobMethod`."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from pomelo.catalog.reported_cost import microdollars
from pomelo.gen.v1.text_pb2 import TextDelta
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
        if self._task_type == "text":
            self._expect(which, "text_delta")
            self._text(event.text_delta)
        elif self._task_type in ("text_to_speech", "speech_to_speech"):
            self._expect(which, "audio_chunk")
            self._audio(event)
        elif self._task_type == "image" and which == "image_progress":
            self._image_progress(event.image_progress.progress)
        else:
            self._expect(which, "result")
            self._result(event)

    def end(self) -> None:
        """Check the end of a response that did not fail."""
        if not self.events:
            self._report("a response without any event ends without an error")
        elif self._task_type in ("text_to_speech", "speech_to_speech"):
            self.complete = True
        elif not self.complete:
            self._report("the response ends without its last event, and without an error")

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

    def _text(self, delta: TextDelta) -> None:
        self.delivered += len(delta.content.encode())
        if not self._stream and not delta.finish_reason:
            self._report("a whole response has more than one event")
        if delta.finish_reason:
            self.complete = True
            usage = delta.usage
            if not delta.HasField("usage"):
                if self._needs_usage:
                    self._report("the last delta has no usage")
            elif not (0 <= usage.prompt_tokens <= MAX_TOKENS and 0 <= usage.completion_tokens <= MAX_TOKENS):
                self._report("an impossible count of tokens is passed on")
            elif usage.total_tokens != usage.prompt_tokens + usage.completion_tokens:
                self._report("the usage does not add up")
        elif delta.HasField("usage") and not self.delivered:
            self._report("usage is reported before the first text")

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

    def _result(self, event: Event) -> None:
        self.complete = True
        output = "image" if self._task_type == "image" else "transcription"
        self._expect(event.result.WhichOneof("output"), output)
        if output == "transcription":
            self.delivered += len(event.result.transcription.text.encode())
            return
        images = event.result.image.images
        if len(images) != 1 or not images[0].data or not images[0].content_type.startswith("image/"):
            self._report("a result must have one image, with data and content_type")
        self.delivered += sum(len(image.data) for image in images)

    def _expect(self, actual: str | None, expected: str) -> None:
        if actual != expected:
            self._report(f"it yielded {actual} instead of {expected}")

    def _report(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
