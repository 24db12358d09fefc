"""What a provider yields, read as the engine reads it, and held against what `JobMethod` promises.

`pomelo.testing.suite` feeds it event by event; it knows no vendor.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from pomelo.catalog.reported_cost import microdollars
from pomelo.gen.v1.text_pb2 import TextDelta
from pomelo.providers.base import Event

PIECE_MOST = 64 * 1024
TOKENS_MOST = 10**9


class Reading:
    """One answer of a kind of task, whole or streamed, as far as it has come. With `counted` False its
    vendor's count of tokens can't be true: it may end without one."""

    def __init__(self, kind: str, *, stream: bool, counted: bool = True) -> None:
        self._kind = kind
        self._stream = stream
        self._counted = counted
        self._progress = -1.0
        self.events = 0
        self.complete = False
        """Whether what has come would be taken for a complete answer. Of a sound its events can't tell."""
        self.delivered = 0
        """Bytes of the output so far: of the text, the sound, the picture."""
        self.problems: list[str] = []

    def add(self, event: Event) -> None:
        """Takes in the next event."""
        if self.complete:
            self._blame("an event comes after the last one")
        self.events += 1
        which = event.WhichOneof("event")
        if self._kind == "text":
            self._expect(which, "text_delta")
            self._text(event.text_delta)
        elif self._kind in ("text_to_speech", "speech_to_speech"):
            self._expect(which, "audio_chunk")
            self._sound(event)
        elif self._kind == "image" and which == "image_progress":
            self._told(event.image_progress.progress)
        else:
            self._expect(which, "result")
            self._result(event)

    def end(self) -> None:
        """The answer has ended, and nothing failed."""
        if not self.events:
            self._blame("an answer without any event ends as if it were one")
        elif self._kind in ("text_to_speech", "speech_to_speech"):
            self.complete = True
        elif not self.complete:
            self._blame("the answer ends without its last event, and no error says so")

    def reported(self, cost: Any, expected: int | float | Decimal) -> None:
        """The answer has ended in good order, and its report has this cost in US dollars."""
        try:
            micros = microdollars(cost)
        except ValueError as error:
            self._blame(f"the cost that it reports is none: {error}")
            return
        if micros != microdollars(expected):
            self._blame(f"it reports a cost of {cost} US dollars, and should report {expected}")

    def fail(self) -> None:
        """The answer has ended in an error."""
        if self.complete:
            self._blame("an answer that fails looked complete before")
        if self.events and self._kind in ("text", "speech_to_text") and not self._stream:
            self._blame("a whole answer that fails yields something before")

    def _text(self, delta: TextDelta) -> None:
        self.delivered += len(delta.content.encode())
        if not self._stream and not delta.finish_reason:
            self._blame("a whole answer is more than one event")
        if delta.finish_reason:
            self.complete = True
            usage = delta.usage
            if not delta.HasField("usage"):
                if self._counted:
                    self._blame("the last delta has no usage")
            elif not (
                0 <= usage.prompt_tokens <= TOKENS_MOST and 0 <= usage.completion_tokens <= TOKENS_MOST
            ):
                self._blame("a count that can't be true is passed on")
            elif usage.total_tokens != usage.prompt_tokens + usage.completion_tokens:
                self._blame("the usage does not add up")
        elif delta.HasField("usage") and not self.delivered:
            self._blame("a usage comes before the first text")

    def _sound(self, event: Event) -> None:
        piece = event.audio_chunk
        self.delivered += len(piece.data)
        if not 0 < len(piece.data) <= PIECE_MOST:
            self._blame(f"a piece of sound has {len(piece.data)} bytes")
        if bool(piece.content_type) != (self.events == 1):
            self._blame("the first piece of a sound, and no other, must have the content_type")

    def _told(self, progress: float) -> None:
        if not self._stream:
            self._blame("a whole picture has a progress")
        if not self._progress < progress <= 1:
            self._blame("the progress does not grow, or leaves 0 to 1")
        self._progress = progress

    def _result(self, event: Event) -> None:
        self.complete = True
        wanted = "image" if self._kind == "image" else "transcription"
        self._expect(event.result.WhichOneof("output"), wanted)
        if wanted == "transcription":
            self.delivered += len(event.result.transcription.text.encode())
            return
        images = event.result.image.images
        if len(images) != 1 or not images[0].data or not images[0].content_type.startswith("image/"):
            self._blame("a result must have one picture, with data and content_type")
        self.delivered += sum(len(image.data) for image in images)

    def _expect(self, found: str | None, wanted: str) -> None:
        if found != wanted:
            self._blame(f"there is {found} where {wanted} belongs")

    def _blame(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
