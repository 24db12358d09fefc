"""The input of a text task: its texts besides those of messages, and its likely length."""

from __future__ import annotations

from pomelo.gen.v1.text_pb2 import TextInput

LONG_INPUT_BYTES = 300_000
"""The size of an input from which on a model may need more than a minute to read it."""

_LIKELY_BYTES_PER_TOKEN = 3
"""Fewer than the average of nearly all texts."""

_LIKELY_IMAGE_TOKENS = 2_000


def likely_tokens(task_input: TextInput) -> int:
    """Return about how many tokens an input has, rather too many than too few."""
    size, images = task_input.ByteSize(), 0
    for message in task_input.messages:
        for part in message.content:
            if part.HasField("image"):
                images += 1
                size -= part.ByteSize()
    return size // _LIKELY_BYTES_PER_TOKEN + _LIKELY_IMAGE_TOKENS * images


def other_texts(task_input: TextInput) -> list[str]:
    """Return all texts that a model reads, except the text parts and names of messages."""
    texts: list[str] = []
    for message in task_input.messages:
        for part in message.content:
            if part.HasField("tool_call"):
                texts += (part.tool_call.name, part.tool_call.arguments_json)
            elif part.HasField("tool_result"):
                texts.append(part.tool_result.content)
    for tool in task_input.tools:
        texts += (tool.name, tool.description, tool.parameters_json)
    schema = task_input.format.json_schema
    if schema.name:
        texts += (schema.name, schema.description, schema.schema_json)
    return texts
