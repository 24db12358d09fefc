"""The tasks that a client runs, made from plain arguments: the one source of the methods of both clients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, Literal, ParamSpec, TypedDict, TypeVar, Unpack, cast

from pomelo.client.files import Audio, Upload, to_source
from pomelo.client.messages import (
    JsonSchema,
    Messages,
    Tool,
    check_list,
    to_enum,
    to_format,
    to_messages,
    to_tool,
    to_tool_choice,
)
from pomelo.client.results import (
    ImageReader,
    ImageResult,
    Reader,
    SpeechReader,
    SpeechResult,
    TextReader,
    TextResult,
    Transcript,
    TranscriptReader,
)
from pomelo.gen.v1 import media_pb2
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.gen.v1.media_pb2 import MediaDelivery, MediaSource
from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    TimestampGranularity,
    VoiceSettings,
)
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.gen.v1.text_pb2 import ReasoningEffort, TextInput

T = TypeVar("T")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M")
P = ParamSpec("P")

Delivery = Literal["bytes", "link", "both"]

_DELIVERIES: dict[Delivery | None, MediaDelivery.ValueType] = {
    None: media_pb2.MEDIA_DELIVERY_UNSPECIFIED,
    "bytes": media_pb2.MEDIA_DELIVERY_INLINE,
    "link": media_pb2.MEDIA_DELIVERY_LINK,
    "both": media_pb2.MEDIA_DELIVERY_BOTH,
}

_INSTEAD = {
    "response_format": ". Use format for text, delivery for images and speech",
    "stream": ". Use a method whose name begins with stream",
}
"""What to use instead of the fields of REST that are not arguments, for error messages."""


class Settings(TypedDict, total=False):
    """Arguments that every task takes.

    `timeout` is the seconds that the call may take with its retries, `retries` how often it is repeated at
    most (defaults: the client's). `strict` refuses a task with a field that the model does not support as
    given. `user` is your id of the end user, `metadata` your own data for the usage record. `idempotency_key`
    identifies the task for 24 hours; the client makes one, unless `retries` is 0. Empty: none; then only what
    the server has refused is repeated. `request_id` is your id of the request.
    """

    timeout: float | None
    retries: int | None
    strict: bool | None
    user: str
    metadata: Mapping[str, str]
    idempotency_key: str | None
    request_id: str | None


class Voice(TypedDict, total=False):
    """How a voice speaks: `stability`, `similarity_boost` and `style` are 0 to 1, `speed` is 0.25 to 4."""

    stability: float
    similarity_boost: float
    style: float
    use_speaker_boost: bool
    speed: float


@dataclass(frozen=True, slots=True)
class Task(Generic[T, R]):
    """A task to run, and how to read its pieces and its result. `upload` is the audio that is uploaded
    first."""

    spec: TaskSpec
    options: TaskOptions
    settings: Settings
    reader: type[Reader[T, R]]
    upload: Upload | None = None


def described_by(build: Callable[..., Any]) -> Callable[[F], F]:
    """Gives a method the docstring and the arguments of a function of this module."""
    signature = inspect.signature(build)
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)

    def describe(method: F) -> F:
        described: Any = wraps(build)(method)
        described.__signature__ = signature.replace(
            parameters=[receiver, *signature.parameters.values()], return_annotation=inspect.Signature.empty
        )
        return method

    return describe


def text(
    model: str,
    messages: Messages,
    *,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    tools: Sequence[Tool] = (),
    tool_choice: Literal["auto", "none", "required"] | Tool | None = None,
    parallel_tool_calls: bool | None = None,
    format: Literal["text", "json"] | JsonSchema | None = None,  # noqa: A002 - the name in the contract
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None,
    **settings: Unpack[Settings],
) -> Task[str, TextResult]:
    """A text from a conversation: a text, or messages, after the instructions `system`.

    `tool_choice` says whether the model calls `tools`; a Tool is one that it must call. `format` is the form
    of the text. All other arguments are those of the contract (proto/pomelo/v1/text.proto), and of
    `Settings`.
    """
    check_list(tools, "tools must be a list of Tool")
    task_input = _message(
        TextInput,
        messages=to_messages(messages, system),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=[stop] if isinstance(stop, str) else stop,
        seed=seed,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        tools=[to_tool(tool) for tool in tools],
        tool_choice=to_tool_choice(tool_choice),
        parallel_tool_calls=parallel_tool_calls,
        format=to_format(format),
        reasoning_effort=to_enum(ReasoningEffort, "reasoning_effort", reasoning_effort),
    )
    return _task(TaskSpec(model=model, text=task_input), TextReader, settings)


def image(
    model: str,
    prompt: str,
    *,
    width: int | None = None,
    height: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    output_format: Literal["png", "jpeg", "webp"] | None = None,
    delivery: Delivery = "bytes",
    **settings: Unpack[Settings],
) -> Task[float, ImageResult]:
    """An image from a text; the pieces of a stream are its progress, from 0 to 1.

    `delivery` says whether the result has the bytes, a link, or both; above 16 MiB it always has a link. All
    other arguments are those of the contract (proto/pomelo/v1/image.proto), and of `Settings`.
    """
    task_input = _message(
        ImageInput,
        prompt=prompt,
        width=width,
        height=height,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        output_format=to_enum(ImageFormat, "output_format", output_format),
    )
    return _task(TaskSpec(model=model, image=task_input), ImageReader, settings, delivery=delivery)


def speech(
    model: str,
    text: str,
    *,
    voice: str,
    voice_settings: Voice | None = None,
    output_format: str = "",
    language_code: str = "",
    seed: int | None = None,
    delivery: Delivery = "bytes",
    **settings: Unpack[Settings],
) -> Task[bytes, SpeechResult]:
    """Speech from a text; the pieces of a stream are those of the file.

    `delivery` says whether the result has the bytes, a link, or both; above 16 MiB it always has a link. All
    other arguments are those of the contract (proto/pomelo/v1/speech.proto), and of `Settings`.
    """
    task_input = _message(
        TextToSpeechInput,
        text=text,
        voice=voice,
        voice_settings=_voice_settings(voice_settings),
        output_format=output_format,
        language_code=language_code,
        seed=seed,
    )
    return _task(TaskSpec(model=model, text_to_speech=task_input), SpeechReader, settings, delivery=delivery)


def convert_speech(
    model: str,
    audio: Audio,
    *,
    voice: str,
    voice_settings: Voice | None = None,
    output_format: str = "",
    seed: int | None = None,
    content_type: str = "",
    delivery: Delivery = "bytes",
    **settings: Unpack[Settings],
) -> Task[bytes, SpeechResult]:
    """Speech in another voice; the pieces of a stream are those of the file.

    Large audio is uploaded first. `content_type` is needed only for raw samples, such as
    audio/pcm;rate=16000. All other arguments are those of `speech`.
    """
    spec = TaskSpec(
        model=model,
        speech_to_speech=_message(
            SpeechToSpeechInput,
            voice=voice,
            voice_settings=_voice_settings(voice_settings),
            output_format=output_format,
            seed=seed,
        ),
    )
    upload = _set_audio(spec.speech_to_speech.audio, audio, content_type)
    return _task(spec, SpeechReader, settings, delivery=delivery, upload=upload)


def transcribe(
    model: str,
    audio: Audio,
    *,
    language_code: str = "",
    diarize: bool = False,
    num_speakers: int | None = None,
    timestamps: Literal["none", "word", "character"] | None = None,
    content_type: str = "",
    **settings: Unpack[Settings],
) -> Task[object, Transcript]:
    """A transcript of speech.

    Large audio is uploaded first. `content_type` is needed only for raw samples, such as
    audio/pcm;rate=16000. All other arguments are those of the contract (proto/pomelo/v1/speech.proto), and of
    `Settings`.
    """
    spec = TaskSpec(
        model=model,
        speech_to_text=_message(
            SpeechToTextInput,
            language_code=language_code,
            diarize=diarize,
            num_speakers=num_speakers,
            timestamps=to_enum(TimestampGranularity, "timestamps", timestamps),
        ),
    )
    upload = _set_audio(spec.speech_to_text.audio, audio, content_type)
    return _task(spec, TranscriptReader, settings, upload=upload)


def _task(
    spec: TaskSpec,
    reader: type[Reader[T, R]],
    settings: Settings,
    *,
    delivery: Delivery | None = None,
    upload: Upload | None = None,
) -> Task[T, R]:
    unknown = settings.keys() - Settings.__optional_keys__
    if unknown:
        name = min(unknown)
        raise TypeError(f"There is no argument {name!r}{_INSTEAD.get(name, '')}")
    spec.user = settings.get("user") or ""
    for key, value in dict(settings.get("metadata") or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must have texts, not {key!r}: {value!r}")
        spec.metadata[key] = value
    if delivery not in _DELIVERIES:
        raise ValueError(f"delivery must be bytes, link or both, not {delivery!r}")
    return Task(spec, TaskOptions(delivery=_DELIVERIES[delivery]), settings, reader, upload)


def _set_audio(target: MediaSource, audio: Audio, content_type: str) -> Upload | None:
    """Sets small audio; returns audio that has to be uploaded."""
    source = to_source(audio, content_type)
    if isinstance(source, Upload):
        return source
    target.CopyFrom(source)
    return None


def _voice_settings(voice: Voice | None) -> VoiceSettings | None:
    if voice is None:
        return None
    names = VoiceSettings.DESCRIPTOR.fields_by_name
    if unknown := voice.keys() - names:
        raise TypeError(f"voice_settings has no {min(unknown)!r}. It has {', '.join(names)}")
    return _message(VoiceSettings, **voice)


def _message(message_type: Callable[P, M], *none: P.args, **fields: P.kwargs) -> M:
    """Returns the message with these fields. Unlike protobuf's, its errors name the field."""
    try:
        return message_type(*none, **fields)
    except (TypeError, ValueError):
        for name, value in fields.items():
            try:
                cast("Callable[..., M]", message_type)(**{name: value})
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name} can't be {value!r:.100}: {error}") from None
        raise
