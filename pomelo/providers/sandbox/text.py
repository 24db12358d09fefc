"""Text replies of the sandbox. A token of the sandbox is a word: text between white space."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import cycle, islice

from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import FinishReason, Message, Role, TextInput

IMAGE_TOKENS = 85
"""Tokens of an image in a message."""

MAX_WORDS = 1_000_000
"""Words of a reply of a model without a limit."""

_FILLER = (
    "The same words, model and seed always bring this answer, today and tomorrow.",
    "A pomelo is the largest of the citrus fruits, and the mildest of them.",
    "Every word here counts as one token, so you can check the bill by hand.",
    "Morning light moves slowly over the hills and wakes the birds one by one.",
    "Build against it freely, for test credits are all that it costs you.",
    "Rain tapped on the tin roof while the kettle thought about its song.",
    "Ask for more words with a trigger when you want to see a long stream.",
    "A small boat crossed the lake and left a silver line behind it.",
    "Good software says what it does and then does what it said.",
    "The old lighthouse keeper counts ships, gulls and the seconds between waves.",
    "Swap in a live key and a real model takes over from here.",
    "Somewhere a train is late, and nobody on the platform minds the quiet.",
    "Errors, delays and broken streams can be had on request as well.",
    "Seven lanterns hung above the market, each one a different shade of gold.",
    "Nothing in these sentences is true because a model found it out.",
    "The gardener smiled, closed the gate and let the evening come in.",
)


def read_prompt(messages: Sequence[Message]) -> tuple[str, int]:
    """The text of the user's last message (empty without one), and the tokens of all messages."""
    tokens = 0
    last = ""
    for message in messages:
        parts = message.content
        text = "\n".join([part.text for part in parts if part.HasField("text")])
        tokens += len(text.split()) + IMAGE_TOKENS * sum(part.HasField("image") for part in parts)
        if message.role == Role.ROLE_USER:
            last = text
    return last, tokens


def check_length(tokens: int, limit: int) -> None:
    """Checks that a prompt has at most `limit` tokens (0: any number).

    Raises:
        PomeloError: context_length_exceeded.
    """
    if tokens > limit > 0:
        raise PomeloError(
            "context_length_exceeded",
            f"The prompt has {tokens:,} tokens, the model takes {limit:,}. Shorten messages",
            field="messages",
            values={"tokens": tokens, "maxTokens": limit},
        )


def reply(
    prompt: str, given: TextInput, model: str, words: int = 0, max_tokens: int = 0
) -> tuple[str, FinishReason.ValueType]:
    """The reply to `prompt`, with one space between words, and its finish reason.

    `words` is the requested length (0: a short reply); `max_tokens` is the model's limit (0: none).
    """
    digest = zlib.crc32(f"{model} {given.seed if given.HasField('seed') else '-'} {prompt}".encode())
    first = digest % len(_FILLER)
    second = (first + 1 + (digest >> 8) % (len(_FILLER) - 1)) % len(_FILLER)
    echo = " ".join(prompt[:200].split()[:12])
    text = (
        f'This is the Pomelo sandbox, answering for {model}. You said: "{echo}" '
        f"{_FILLER[first]} {_FILLER[second]}"
    )
    limit = min(filter(None, (max_tokens, given.max_tokens)), default=0)
    if words:
        # One more than the limit shows below that the reply was truncated.
        text = _of_length(text, first, min(words, (limit or MAX_WORDS) + 1))
    finish = FinishReason.FINISH_REASON_STOP
    # A word has at least a letter and a space, so most replies are known to be short without splitting them.
    if limit and len(text) >= limit * 2 and (pieces := text.split(" ", limit))[limit:]:
        text = " ".join(pieces[:limit])
        finish = FinishReason.FINISH_REASON_LENGTH
    if given.stop:
        ends = [end for end in map(text.find, given.stop) if end >= 0]
        if ends:
            return text[: min(ends)].rstrip(" "), FinishReason.FINISH_REASON_STOP
    return text, finish


def count(text: str) -> int:
    """The number of tokens of a reply."""
    return text.count(" ") + 1 if text else 0


def _of_length(text: str, first: int, words: int) -> str:
    """Exactly `words` words: those of `text`, then filler sentences from number `first` on."""
    start = text.split(" ")
    more = cycle(" ".join(_FILLER[first:] + _FILLER[:first]).split(" "))
    return " ".join((start + list(islice(more, max(0, words - len(start)))))[:words])
