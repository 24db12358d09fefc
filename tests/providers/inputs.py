"""Inputs that the contract takes, for hypothesis: any of them, within the ranges that `pomelo.tasks` checks.

Extremes are frequent: a request that is made of an input must be one that the vendor takes whatever was asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import strategies as st

from pomelo.audio_formats import AUDIO_FORMATS as FORMATS
from pomelo.catalog.catalog import Model
from pomelo.fields import MAX_SEED, MAX_SIDE, MAX_SPEAKERS, MAX_STOPS, MAX_USER_CHARACTERS, MIN_SIDE
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    TimestampGranularity,
    VoiceSettings,
)
from pomelo.gen.v1.text_pb2 import (
    ContentPart,
    ImageDetail,
    ImagePart,
    JsonSchema,
    Message,
    ReasoningEffort,
    Role,
    TextFormat,
    TextInput,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from pomelo.providers.base import AudioSource
from pomelo.providers.elevenlabs.voices import DEFAULTS
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import TaskDefinition

PICTURES = tuple(
    f"data:image/{kind};base64,{data}"
    for kind, data in (
        ("png", "iVBORw0KGgo="),
        ("jpeg", "/9j/"),
        ("webp", "UklGRgQAAABXRUJQ"),
        ("gif", "R0lGODlh"),
    )
)
MINE = "abcdefghijklmnopqrst"
"""The id of a voice of the account's own. The names of such voices are not among the inputs, as they are those
of a list that an account has."""

_TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", " ", "\n", "\u00a0", "Hi", "Grüße 🍊", "[DONE]", '"}]', "\x00", "x" * 3000]),
)
_NON_EMPTY_TEXTS = st.one_of(
    st.text(min_size=1, max_size=40), st.sampled_from([" ", "Hi", "Grüße 🍊", "x" * 3000])
)


def given(model: Model) -> st.SearchStrategy[Any]:
    """Any valid input for a model of the catalogue; the model's check has passed each of them."""
    kind = TASK_TYPES[model.task_type]
    return _INPUTS[kind.name].map(partial(_checked, model, kind))


def users() -> st.SearchStrategy[str]:
    """Any id of an end user that a caller can give, or none."""
    return st.text(max_size=MAX_USER_CHARACTERS)


def audio_sources() -> st.SearchStrategy[AudioSource]:
    """Any audio that an input can have, with a media type of the caller or of the media store."""
    types = [
        "audio/mpeg",
        "audio/wav",
        "audio/ogg",
        "audio/flac",
        "audio/mp4",
        "video/webm",
        "audio/pcm;rate=16000",
        "Audio/PCM; rate=16000",
        "audio/pcm;rate=8000",
        "application/octet-stream",
        "",
        'a"b\r\nc',
        "audio/ogg; codecs=opus",
    ]
    kinds = st.sampled_from(types)
    return st.builds(
        lambda kind, data: AudioSource(kind, len(data), data=data), kinds, st.binary(min_size=1, max_size=99)
    )


def _checked(model: Model, kind: TaskDefinition, message: Any) -> Any:
    kind.check(message, model, _read_no_media)
    return message


def _read_no_media(media_id: str, field: str) -> bytes:
    raise AssertionError("no image of an input is in a file")


def _messages_of(
    message: Callable[..., Any], needed: dict[str, Any], **optional: Any
) -> st.SearchStrategy[Any]:
    """Messages with the `needed` fields and any of the `optional` ones."""
    return st.fixed_dictionaries(needed, optional=optional).map(lambda fields: message(**fields))


def _number(minimum: float, maximum: float) -> st.SearchStrategy[float]:
    return st.one_of(
        st.floats(minimum, maximum, allow_nan=False),
        st.sampled_from([float(minimum), float(maximum), (minimum + maximum) / 2]),
        st.integers(int(minimum), int(maximum)).filter(lambda value: minimum <= value <= maximum).map(float),
    )


def _integer(minimum: int, maximum: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(minimum, maximum), st.sampled_from([minimum, maximum]))


def _message(role: Role.ValueType) -> st.SearchStrategy[Message]:
    text = st.builds(lambda content: ContentPart(text=content), _TEXTS)
    source = st.sampled_from(PICTURES).map(lambda url: MediaSource(url=url))
    details = st.sampled_from(ImageDetail.values())
    image = st.builds(
        lambda source, detail: ContentPart(image=ImagePart(source=source, detail=detail)), source, details
    )
    part = st.one_of(text, image) if role == Role.ROLE_USER else text
    # One text is the most frequent form, and has a form of its own in requests.
    content = st.one_of(st.tuples(text), st.lists(part, min_size=1, max_size=4))
    names = st.sampled_from(["", "ann", "B-0_b"])
    return st.builds(lambda parts, name: Message(role=role, content=parts, name=name), content, names)


_ROLES = (Role.ROLE_SYSTEM, Role.ROLE_USER, Role.ROLE_ASSISTANT)
_NAMES = st.one_of(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True), st.just("weather"))
_SCHEMAS = st.sampled_from([
    "{}",
    '{"type":"object"}',
    ' {"properties" : {"ü": {"type": "number", "minimum": 1e-7}}, "required": ["ü"]} ',
    '{"type":"object","properties":{"b":{"enum":["🍊"]},"a":{}},"additionalProperties":false}',
])  # fmt: skip
_STRICT_SCHEMAS = st.just('{"type":"object","properties":{},"additionalProperties":false}')
_CALL_IDS = st.one_of(
    st.sampled_from(["1", "call_1", "null", "abcdefghi", "ä:" * 128]), st.text(min_size=1, max_size=50)
)
_ARGUMENTS = st.sampled_from(["", "{}", '{"b": 1, "a": [null, 1e999]}', "{", "[]", '"x"', '{"a":"\\ud83c"}'])


def _strictly(message: Callable[..., Any], field: str, **more: Any) -> st.SearchStrategy[Any]:
    """Messages with a schema, which is one that vendors take as strict if they are."""
    loose = _messages_of(message, {**more, field: _SCHEMAS}, strict=st.just(False))
    return st.one_of(loose, _messages_of(message, {**more, field: _STRICT_SCHEMAS}, strict=st.booleans()))


def _tools() -> st.SearchStrategy[list[Tool]]:
    texts = st.sampled_from(["", "Looks out of the window"])
    declared = _strictly(Tool, "parameters_json", name=_NAMES, description=texts)
    tool = st.one_of(declared, st.builds(Tool, name=_NAMES))
    return st.lists(tool, min_size=1, max_size=3, unique_by=lambda each: each.name)


@st.composite
def _exchanges(draw: st.DrawFn) -> list[Message]:
    """A message of the assistant that calls tools, and the messages with their results."""
    ids = draw(st.lists(_CALL_IDS, min_size=1, max_size=3, unique=True))
    calls = [
        ContentPart(tool_call=ToolCall(id=each, name=draw(_NAMES), arguments_json=draw(_ARGUMENTS)))
        for each in ids
    ]
    texts = [ContentPart(text=each) for each in draw(st.lists(_TEXTS, max_size=2))]
    results = [
        ContentPart(
            tool_result=ToolResult(tool_call_id=each, content=draw(_TEXTS), is_error=draw(st.booleans()))
        )
        for each in draw(st.permutations(ids))
    ]
    cut = draw(st.integers(0, len(results)))
    messages = [Message(role=Role.ROLE_TOOL, content=some) for some in (results[:cut], results[cut:]) if some]
    return [Message(role=Role.ROLE_ASSISTANT, content=[*texts, *calls]), *messages]


def _conversations() -> st.SearchStrategy[list[Message]]:
    one = st.sampled_from(_ROLES).flatmap(_message).map(lambda message: [message])
    steps = st.lists(st.one_of(one, one, _exchanges()), min_size=1, max_size=6)
    return steps.map(lambda parts: [message for messages in parts for message in messages])


@st.composite
def _texts(draw: st.DrawFn, /, **fields: st.SearchStrategy[Any]) -> TextInput:
    task: TextInput = draw(_messages_of(TextInput, {"messages": _conversations()}, **fields))
    if draw(st.booleans()):
        task.tools.extend(draw(_tools()))
        modes = [ToolChoice(mode=mode) for mode in ToolChoice.Mode.values()[1:]]
        choices = [None, ToolChoice(tool=task.tools[-1].name), *modes]
        if choice := draw(st.sampled_from(choices)):
            task.tool_choice.CopyFrom(choice)
        if (parallel := draw(st.sampled_from([None, False, True]))) is not None:
            task.parallel_tool_calls = parallel
    return task


_SETTINGS = _messages_of(
    VoiceSettings,
    {},
    stability=_number(0, 1),
    similarity_boost=_number(0, 1),
    style=_number(0, 1),
    use_speaker_boost=st.booleans(),
    speed=_number(0.25, 4),
)
_VOICES = st.one_of(
    st.sampled_from(sorted(DEFAULTS)),
    st.sampled_from(sorted(DEFAULTS.values())),
    st.sampled_from(["ADAM", MINE]),
)
_LANGUAGES = st.sampled_from(["", "en", "DE", "deu", "ENG", "en-US", "haw"])
_SPEECH: dict[str, Any] = {
    "voice_settings": _SETTINGS,
    "output_format": st.sampled_from(["", *sorted(FORMATS)]),
    "seed": _integer(0, 2**32 - 1),
}
_AUDIO = st.just(MediaSource(media_id="media_1"))

_INPUTS: dict[str, st.SearchStrategy[Any]] = {
    "text": _texts(
        max_tokens=_integer(1, 2**31 - 1),
        temperature=_number(0, 2),
        top_p=_number(0, 1),
        stop=st.lists(_NON_EMPTY_TEXTS, max_size=MAX_STOPS),
        seed=_integer(0, MAX_SEED),
        presence_penalty=_number(-2, 2),
        frequency_penalty=_number(-2, 2),
        format=st.one_of(
            st.just(TextFormat(json_object=TextFormat.JsonObject())),
            st.builds(TextFormat, json_schema=_strictly(JsonSchema, "schema_json", name=_NAMES)),
        ),
        reasoning_effort=st.sampled_from(ReasoningEffort.values()),
    ),
    "image": _messages_of(
        ImageInput,
        {"prompt": _NON_EMPTY_TEXTS},
        width=_integer(MIN_SIDE, MAX_SIDE),
        height=_integer(MIN_SIDE, MAX_SIDE),
        num_inference_steps=_integer(1, 100),
        guidance_scale=_number(0, 20),
        seed=_integer(0, MAX_SEED),
        output_format=st.sampled_from(ImageFormat.values()),
    ),
    "text_to_speech": _messages_of(
        TextToSpeechInput, {"text": _NON_EMPTY_TEXTS, "voice": _VOICES}, language_code=_LANGUAGES, **_SPEECH
    ),
    "speech_to_speech": _messages_of(SpeechToSpeechInput, {"audio": _AUDIO, "voice": _VOICES}, **_SPEECH),
    "speech_to_text": _messages_of(
        SpeechToTextInput,
        {"audio": _AUDIO},
        language_code=_LANGUAGES,
        diarize=st.booleans(),
        num_speakers=_integer(1, MAX_SPEAKERS),
        timestamps=st.sampled_from(TimestampGranularity.values()),
    ),
}
"""By the kind's name."""
