"""Checks the messages of a text task: their parts, and that tool calls and results belong together."""

from __future__ import annotations

from collections.abc import Iterator

from pomelo.errors import PomeloError, invalid, missing
from pomelo.fields import MAX_CALL_CHARACTERS, MAX_MESSAGES, MAX_PARTS, MAX_TOTAL_PARTS, check_name
from pomelo.gen.v1.text_pb2 import (
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_TOOL,
    ROLE_USER,
    ImageDetail,
    ImagePart,
    Message,
    TextInput,
    ToolCall,
)
from pomelo.media import data_uris
from pomelo.media.content_types import HEAD_BYTES, image_type
from pomelo.tasks.base import ReadMedia

_ROLES = frozenset((ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL))

_NOT_AN_IMAGE = "a PNG, JPEG, WebP or GIF image. The bytes decide, not the media type"


OpenCalls = dict[str, str]
"""The tool calls of the last message of the assistant that have no result yet: id -> label."""


def check_messages(task_input: TextInput, read_media: ReadMedia) -> int:
    """Refuses messages that no text model takes. Replaces each image by a `data:` URI in its canonical form.
    Returns the bytes of the messages' parts, without those of images.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    messages = task_input.messages
    if not messages:
        raise missing("messages")
    if len(messages) > MAX_MESSAGES:
        raise invalid("messages", f"at most {MAX_MESSAGES:,} messages", maximum=MAX_MESSAGES)
    size = parts = 0
    open_calls: OpenCalls = {}
    for index, message in enumerate(messages):
        role = message.role
        if role not in _ROLES:
            name = f"messages[{index}].role"
            raise invalid(name, "system, user, assistant or tool") if role else missing(name)
        if message.name:
            check_name(message.name, f"messages[{index}].name")
        if open_calls and role != ROLE_TOOL:
            raise _unanswered(open_calls)
        content = message.content
        if len(content) == 1 and (part := content[0]).HasField("text") and role != ROLE_TOOL:
            size += part.ByteSize()  # reading a long text would decode it
            continue
        parts += len(content)
        if parts > MAX_TOTAL_PARTS:
            expected = f"at most {MAX_TOTAL_PARTS:,} parts in all messages together"
            raise invalid("messages", expected, maximum=MAX_TOTAL_PARTS)
        label = f"messages[{index}]"
        if not content:
            raise missing(f"{label}.content")
        if len(content) > MAX_PARTS:
            raise invalid(f"{label}.content", f"at most {MAX_PARTS} parts", maximum=MAX_PARTS)
        if role == ROLE_TOOL:
            size += _check_results(message, label, open_calls)
        else:
            size += _check_parts(message, label, read_media, open_calls)
    if open_calls:
        raise _unanswered(open_calls)
    return size


def _unanswered(open_calls: OpenCalls) -> PomeloError:
    return invalid(next(iter(open_calls.values())), "answered by the result of the tool, right after it")


def _check_parts(message: Message, label: str, read_media: ReadMedia, open_calls: OpenCalls) -> int:
    size = calls = 0
    for index, part in enumerate(message.content):
        part_type = part.WhichOneof("part")
        name = f"{label}.content[{index}]"
        if part_type == "tool_call":
            if message.role != ROLE_ASSISTANT:
                raise invalid(name, "a text; only messages of the role assistant can contain tool calls")
            _check_call(part.tool_call, f"{label}.tool_calls[{calls}]", open_calls)
            size += part.ByteSize()
            calls += 1
        elif part_type == "tool_result":
            raise invalid(name, "a text; only messages of the role tool can contain results of tools")
        elif calls:
            raise invalid(name, "before the tool calls")
        elif part_type is None:
            raise invalid(name, "a text or an image_url")
        elif part_type == "text":
            size += part.ByteSize()
        elif message.role != ROLE_USER:
            raise invalid(name, "a text; only messages of the role user can contain images")
        else:
            _check_image(part.image, f"{name}.image_url", read_media)
    return size


def _check_call(call: ToolCall, label: str, open_calls: OpenCalls) -> None:
    for name, value in ((f"{label}.id", call.id), (f"{label}.function.name", call.name)):
        if not value:
            raise missing(name)
        if len(value) > MAX_CALL_CHARACTERS:
            raise invalid(name, f"at most {MAX_CALL_CHARACTERS} characters", maximum=MAX_CALL_CHARACTERS)
    if call.id in open_calls:
        raise invalid(f"{label}.id", "another id: an earlier tool call has it")
    open_calls[call.id] = label


def _check_results(message: Message, label: str, open_calls: OpenCalls) -> int:
    size = 0
    for part in message.content:
        if not part.HasField("tool_result"):
            raise invalid(f"{label}.content", "nothing but results of tools: the role is tool")
        result = part.tool_result
        if not result.tool_call_id:
            raise missing(f"{label}.tool_call_id")
        if open_calls.pop(result.tool_call_id, None) is None:
            raise invalid(
                f"{label}.tool_call_id",
                "the id of a tool call in the assistant's message before it, which has no other result",
            )
        size += part.ByteSize()
    return size


def _check_image(image: ImagePart, name: str, read_media: ReadMedia) -> None:
    """Refuses an invalid image; replaces another by its canonical `data:` URI, wherever its bytes are."""
    if image.detail and image.detail not in ImageDetail.values():
        raise invalid(f"{name}.detail", "auto, low or high")
    source = image.source
    kind = source.WhichOneof("source")
    if kind == "media_id":
        source.url = _encode_image(read_media(source.media_id, name), name)
    elif kind == "data":
        source.url = _encode_image(source.data, name)
    elif kind is None:
        raise missing(f"{name}.url")
    else:
        url = source.url
        canonical = _canonical_image(url, name)
        if canonical is not url:
            source.url = canonical
    source.ClearField("content_type")


def image_files(task_input: TextInput) -> Iterator[str]:
    for message in task_input.messages:
        for part in message.content:
            if part.image.source.media_id:
                yield part.image.source.media_id


def _encode_image(data: bytes, name: str) -> str:
    media_type = image_type(data[:HEAD_BYTES])
    if media_type is None:
        raise invalid(name, _NOT_AN_IMAGE)
    return data_uris.encode(data, media_type)


def _canonical_image(url: str, name: str) -> str:
    """The canonical `data:` URI of an image, with the media type of its bytes: vendors refuse any other."""
    _, start = data_uris.head(url, name)
    if not start:
        raise invalid(name, "a data: URI with a base64 PNG, JPEG, WebP or GIF; remote URLs are off")
    media_type = image_type(next(data_uris.decode(url, start, name), b""))
    if media_type is None:
        raise invalid(name, _NOT_AN_IMAGE)
    return data_uris.canonical(url, start, media_type, name)
