"""Tool calls of the sandbox: which tools it calls, and with which arguments."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator

from pydantic_core import from_json

from pomelo.gen.v1.text_pb2 import TextInput, Tool, ToolCall, ToolChoice
from pomelo.providers.base import Event
from pomelo.providers.sandbox.examples import example_of
from pomelo.providers.sandbox.text import Prompt


def tool_calls(prompt: Prompt, given: TextInput, model: str, number: int) -> list[ToolCall]:
    """The calls that answer a message of the user, if the task has tools; none after the tools' results. They
    are `number` calls (0: one) of the chosen tool, or of the tools in turn."""
    choice = given.tool_choice
    if not given.tools or prompt.result is not None or choice.mode == ToolChoice.MODE_NONE:
        return []
    tools = [tool for tool in given.tools if choice.tool in ("", tool.name)]
    if given.HasField("parallel_tool_calls") and not given.parallel_tool_calls:
        number = 1
    number = number or 1
    seed = given.seed if given.HasField("seed") else "-"
    # The text may be long, and many ids taken.
    digest = hashlib.blake2s(f"{model} {seed} {prompt.text}".encode()).hexdigest()
    ids = (_call_id(f"{index} {digest}") for index in itertools.count())
    # Clients know a call by its id, also one that answers the same message again.
    taken = {part.tool_call.id for message in given.messages for part in message.content}
    new_ids = (call_id for call_id in ids if call_id not in taken)
    arguments = itertools.cycle([_arguments(tool, number) for tool in tools[:number]])
    return [
        ToolCall(id=next(new_ids), name=name, arguments_json=text)
        for name, text in itertools.islice(arguments, number)
    ]


def _arguments(tool: Tool, number: int) -> tuple[str, str]:
    """The name of a tool, and arguments that match its schema, for one of `number` calls."""
    schema = from_json(tool.parameters_json) if tool.parameters_json else {}
    example = example_of({"type": "object", **schema}, number)
    return tool.name, json.dumps(example, ensure_ascii=False)


def _call_id(seed: str) -> str:
    return "call_" + hashlib.blake2s(seed.encode(), digest_size=12).hexdigest()


def truncate(calls: list[ToolCall], limit: int) -> Iterator[ToolCall]:
    """The first `limit` tokens of calls: the last arguments may be incomplete."""
    for call in calls:
        if limit <= 0:
            return
        words = _words(call)
        call.arguments_json = " ".join(words[: limit - 1])
        limit -= 1 + len(words)
        yield call


def count(calls: list[ToolCall]) -> int:
    """The tokens of calls: their names and the words of their arguments."""
    return len(calls) + sum(map(len, map(_words, calls)))


def _words(call: ToolCall) -> list[str]:
    return call.arguments_json.split(" ") if call.arguments_json else []


def pieces(calls: list[ToolCall]) -> Iterator[Event]:
    """The calls, a token at a time."""
    for index, call in enumerate(calls):
        event = Event()
        delta = event.tool_call_delta
        delta.index, delta.id, delta.name = index, call.id, call.name
        yield event
        for number, word in enumerate(_words(call)):
            event = Event()
            event.tool_call_delta.index = index
            event.tool_call_delta.arguments_json = " " + word if number else word
            yield event
