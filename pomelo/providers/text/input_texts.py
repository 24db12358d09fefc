"""The texts of a text task besides its messages: tools, their calls and results, and the output format."""

from __future__ import annotations

from pomelo.gen.v1.text_pb2 import TextInput


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
