"""Text tasks: the check of a conversation, and the folding of deltas."""

import re

from pomelo.catalog import Model
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from pomelo.tasks.base import Folding, TaskKind
from pomelo.tasks.ranges import SEED_MOST, within

MESSAGES_MOST = 10_000
PARTS_MOST = 100
STOPS_MOST = 4
USER_MOST = 256

_DATA_URI = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")
_ROLES = frozenset((Role.ROLE_SYSTEM, Role.ROLE_USER, Role.ROLE_ASSISTANT))


def check(given: TextInput, model: Model) -> None:
    """Refuses a conversation or a parameter that no model could take.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    messages = given.messages
    if not messages:
        raise missing("messages")
    if len(messages) > MESSAGES_MOST:
        raise invalid("messages", f"at most {MESSAGES_MOST:,} messages")
    characters = 0
    for index, message in enumerate(messages):
        if message.role not in _ROLES:
            name = f"messages[{index}].role"
            raise invalid(name, "system, user or assistant") if message.role else missing(name)
        if message.HasField("content"):
            characters += len(message.content)
        else:
            characters += _check_parts(message, f"messages[{index}].content")
    if given.HasField("max_tokens") and given.max_tokens < 1:
        raise invalid("max_tokens", "a whole number from 1")
    within(given, "temperature", 0, 2)
    within(given, "top_p", 0, 1)
    within(given, "seed", 0, SEED_MOST)
    within(given, "presence_penalty", -2, 2)
    within(given, "frequency_penalty", -2, 2)
    if given.stop and (len(given.stop) > STOPS_MOST or not all(given.stop)):
        raise invalid("stop", f"at most {STOPS_MOST} strings, none of them empty")
    if len(given.user) > USER_MOST:
        raise invalid("user", f"at most {USER_MOST} characters")
    # Words are fewer than tokens with every tokenizer, and counting them is slow: only where it can matter.
    most = model.limits.max_input_tokens
    if characters > most and _words(given) > most:
        raise PomeloError(
            "context_length_exceeded",
            f"The prompt is longer than the {most:,} tokens that the model takes. Shorten messages",
            field="messages",
        )


def _check_parts(message: Message, name: str) -> int:
    parts = message.parts.parts
    if not parts:
        raise missing(name)
    if len(parts) > PARTS_MOST:
        raise invalid(name, f"at most {PARTS_MOST} parts")
    characters = 0
    for index, part in enumerate(parts):
        which = part.WhichOneof("part")
        if which is None:
            raise invalid(f"{name}[{index}]", "a text or an image_url")
        if which == "text":
            characters += len(part.text)
        elif message.role != Role.ROLE_USER:
            raise invalid(f"{name}[{index}]", "a text; only a message of the user's bears pictures")
        elif not _DATA_URI.fullmatch(part.image_url.url):
            raise invalid(
                f"{name}[{index}].image_url",
                "a data: URI with a base64 PNG, JPEG, WebP or GIF; remote URLs are off",
            )
    return characters


def _words(given: TextInput) -> int:
    count = 0
    for message in given.messages:
        count += len(message.content.split())
        for part in message.parts.parts:
            count += len(part.text.split())
    return count


class TextFold:
    """Joins deltas; the last one, which bears finish_reason and usage, is held until the task is settled."""

    __slots__ = ("_last", "_pieces", "_stream")

    def __init__(self, folding: Folding) -> None:
        self._stream = folding.stream
        self._pieces: list[str] = []
        self._last: StreamTaskResponse | None = None

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        """See Fold."""
        delta = event.text_delta
        if delta.finish_reason:
            self._last = event
            return None
        if self._stream:
            return event
        self._pieces.append(delta.content)
        return None

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        """See Fold."""
        last = self._last
        if last is None:
            raise PomeloError("provider_failed")
        if not self._stream:
            delta = last.text_delta
            output = result.text
            output.content = "".join((*self._pieces, delta.content)) if self._pieces else delta.content
            output.finish_reason = delta.finish_reason
            output.usage.CopyFrom(delta.usage)
        return last

    def close(self) -> None:
        """See Fold."""


KIND = TaskKind("text", "task_", check, TextFold)
