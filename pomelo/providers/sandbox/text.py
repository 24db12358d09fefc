"""Text replies of the sandbox. A token of the sandbox is a word: text between white space."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from itertools import cycle, islice
from typing import NamedTuple

from pydantic_core import from_json

from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import FinishReason, Role, TextInput
from pomelo.providers.base import Event
from pomelo.providers.sandbox.examples import example_of
from pomelo.providers.text.input_texts import other_texts
from pomelo.providers.text.words import count_words

IMAGE_TOKENS = 85
"""Tokens of an image in a message."""

MAX_WORDS = 1_000_000
"""Words of a reply of a model without a limit."""

_FILLER = (
    "The same message, model and seed always return this answer, word for word.",
    "A pomelo is the largest of the citrus fruits, and the mildest of them.",
    "Every word here counts as one token, so you can check the bill by hand.",
    "Morning light moves slowly over the hills and wakes the birds one by one.",
    "Build against it freely, as it will only ever cost you test credits.",
    "Rain tapped on the tin roof while the kettle whistled in the kitchen.",
    "Ask for more words with a trigger when you want to see a long stream.",
    "A small boat crossed the lake and left a silver line behind it.",
    "Good software says what it does and then does what it said.",
    "The old lighthouse keeper counts ships, gulls and the seconds between waves.",
    "Swap in a live key and a real model takes over from here.",
    "Somewhere a train is late, and nobody on the platform minds the quiet.",
    "You can also request errors, delays and streams that are cut off.",
    "Seven lanterns hung above the market, each one a different shade of gold.",
    "These sentences are fixed, and no model was asked to write them.",
    "The gardener smiled, closed the gate and let the evening come in.",
)


class Prompt(NamedTuple):
    """The text of the user's last message (empty without one), that of the tools' results if they come last
    (None: they do not), and the tokens of the whole input."""

    text: str
    result: str | None
    tokens: int


def read_prompt(given: TextInput) -> Prompt:
    tokens = 0
    last = ""
    results: list[str] | None = None
    for message in given.messages:
        parts = message.content
        text = "\n".join([part.text for part in parts if part.HasField("text")])
        tokens += count_words(text) + IMAGE_TOKENS * sum(part.HasField("image") for part in parts)
        if message.role == Role.ROLE_TOOL:
            results = [*(results or ()), *(part.tool_result.content for part in parts)]
        else:
            results = None
        if message.role == Role.ROLE_USER:
            last = text
    tokens += sum(map(count_words, other_texts(given)))
    # As with a vendor, a message that is nothing but white space has tokens, too.
    return Prompt(last, None if results is None else " ".join(results), max(tokens, 1))


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


def output_limit(given: TextInput, model_limit: int) -> int:
    """The tokens that an answer may have; 0: any number. So is a `model_limit` of 0."""
    return min(filter(None, (model_limit, given.max_tokens)), default=0)


def reply(
    prompt: Prompt, given: TextInput, model: str, words: int = 0, limit: int = 0
) -> tuple[str, FinishReason.ValueType]:
    """The reply to `prompt`, with one space between words, and its finish reason.

    `words` is the requested length (0: a short reply); `limit` is the most words (0: any number).
    """
    text = _prose(prompt, given, model, words, limit)
    output_format = given.format.WhichOneof("format")
    if output_format == "json_schema":
        text = json.dumps(example_of(from_json(given.format.json_schema.schema_json)), ensure_ascii=False)
    elif output_format == "json_object":
        text = json.dumps({"answer": text}, ensure_ascii=False)
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


def _prose(prompt: Prompt, given: TextInput, model: str, words: int, limit: int) -> str:
    seed = given.seed if given.HasField("seed") else "-"
    digest = zlib.crc32(f"{model} {seed} {prompt.text}".encode())
    first = digest % len(_FILLER)
    second = (first + 1 + (digest >> 8) % (len(_FILLER) - 1)) % len(_FILLER)
    said, quoted = (
        ("You said", prompt.text) if prompt.result is None else ("The tool returned", prompt.result)
    )
    echo = " ".join(quoted[:200].split()[:12])
    text = (
        f'This is the Pomelo sandbox, answering for {model}. {said}: "{echo}" '
        f"{_FILLER[first]} {_FILLER[second]}"
    )
    if words:
        # One more than the limit shows that the reply was truncated.
        text = _of_length(text, first, min(words, (limit or MAX_WORDS) + 1))
    return text


def pieces(text: str) -> Iterator[Event]:
    """The text as deltas of a word each."""
    for index, word in enumerate(text.split(" ") if text else ()):
        # Filling a new event in place takes a third of the time of building its parts first.
        event = Event()
        event.text_delta.text = " " + word if index else word
        yield event


def count(text: str) -> int:
    """The number of tokens of a reply."""
    return text.count(" ") + 1 if text else 0


def _of_length(text: str, first: int, words: int) -> str:
    """Exactly `words` words: those of `text`, then filler sentences from number `first` on."""
    start = text.split(" ")
    more = cycle(" ".join(_FILLER[first:] + _FILLER[:first]).split(" "))
    return " ".join((start + list(islice(more, max(0, words - len(start)))))[:words])
