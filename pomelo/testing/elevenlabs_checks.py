"""Checks a request as ElevenLabs does, by pydantic: query, JSON and form.

It is strict: it refuses names that the vendor's own client does not have. The values of some fields, such as
those of dictionaries, effects and webhooks, are not checked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    TypeAdapter,
    ValidationError,
    create_model,
)

from pomelo.testing.reply import Received

RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
STREAM_FORMATS = frozenset(
    ["mp3_22050_32", "mp3_24000_48", "ulaw_8000", "alaw_8000"]
    + [f"mp3_44100_{kbits}" for kbits in (32, 64, 96, 128, 192)]
    + [f"pcm_{rate}" for rate in RATES]
    + [f"opus_48000_{kbits}" for kbits in (32, 64, 96, 128, 192)]
)
FORMATS = STREAM_FORMATS | {f"wav_{rate}" for rate in RATES}

Problem = Mapping[str, Any]
"""An entry of the vendor's list of problems: `type`, `loc`, `msg` and `input`."""


def problem(name: str, *path: str | int, message: str = "It can't be so", value: Any = None) -> Problem:
    """Return an entry of the vendor's list of problems."""
    return {"type": name, "loc": list(path), "msg": message, "input": value}


def find_problems(received: Received, api: str, stream: bool) -> list[Problem]:
    """Return all problems of a request; `api` is tts, sts, stt or voices."""
    if api == "voices":
        if "/v1/" in received.path:
            return _check("query", received.query, _OldVoices)
        return _check("query", received.query, _Voices, _VOICE_FILTERS)
    found = _check("query", received.query, _STTQuery if api == "stt" else _QUERIES[stream])
    if api == "tts":
        if not isinstance(received.body, dict):
            return [*found, problem("json_invalid", "body", message="JSON is needed")]
        given = {name: value for name, value in received.body.items() if value is not None}
        return found + _check("body", given, _TTS, _TTS_OTHERS)
    if api == "sts":
        return found + _form(received, _STS, frozenset(), "audio")
    return found + _form(received, _STT, _STT_OTHERS, "file")


def _form(received: Received, fields: type[_Fields], others: Collection[str], file: str) -> list[Problem]:
    if received.form is None:
        return [problem("missing", "body", message="A form is needed")]
    found: list[Problem] = []
    files = [part for part in received.form if part.filename is not None]
    if [part.name for part in files] != [file]:
        found.append(problem("missing", "body", file, message="One file is needed"))
    found += [problem("value_error", "body", part.name) for part in files if not part.size]
    texts: dict[str, str] = {}
    for part in received.form:
        if part.text is not None:
            if part.name in texts and part.name not in others:
                found.append(problem("list_type", "body", part.name, message="It is given twice"))
            texts[part.name] = part.text
    found += _check("body", texts, fields, others)
    if file == "file" and "num_speakers" in texts and texts.get("diarize") != "true":
        found.append(problem("value_error", "body", "num_speakers", message="It requires diarize"))
    if "diarization_threshold" in texts and ("num_speakers" in texts or texts.get("diarize") != "true"):
        found.append(problem("value_error", "body", "diarization_threshold", message="It can't be here"))
    return found


def _check(
    part: str, values: Mapping[str, Any], fields: type[_Fields], others: Collection[str] = ()
) -> list[Problem]:
    """The problems of a part of a request; the values of `others` are not checked."""
    try:
        fields.model_validate({name: value for name, value in values.items() if name not in others})
    except ValidationError as error:
        listed = error.errors(include_url=False, include_context=False)
        return [{**one, "loc": [part, *one["loc"]]} for one in listed]
    return []


def _language(min_length: int, max_length: int) -> AfterValidator:
    def check(code: str) -> str:
        if not (min_length <= len(code) <= max_length and code.isalpha() and code.islower()):
            raise ValueError("not a language")
        return code

    return AfterValidator(check)


_Flag = Literal["true", "false"]
_Name = Annotated[str, Field(min_length=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_FileFormat = Literal["pcm_s16le_16", "other"]


class _Fields(BaseModel):
    """The fields of a JSON object; there are no others. Those with a default may be missing."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Texts(_Fields):
    """The fields of a query or a form, all written as text."""

    model_config = ConfigDict(strict=False)


class _Settings(_Fields):
    stability: _Share = 0
    similarity_boost: _Share = 0
    style: _Share = 0
    clone_strength: _Share = 0
    use_speaker_boost: bool = False
    speed: Annotated[float, Field(ge=0.7, le=1.2)] = 1


class _TTS(_Fields):
    text: Annotated[_Name, Field(max_length=1_000_000)]
    model_id: _Name = ""
    language_code: Annotated[str, _language(2, 2)] = ""
    voice_settings: Annotated[_Settings, BeforeValidator(TypeAdapter(dict[str, Any]).validate_python)] = (
        _Settings()
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    previous_text: str = ""
    next_text: str = ""
    apply_text_normalization: Literal["auto", "on", "off"] = "auto"
    apply_language_text_normalization: bool = False
    use_pvc_as_ivc: bool = False


_TTS_OTHERS = frozenset(
    ("pronunciation_dictionary_locators", "previous_request_ids", "next_request_ids", "audio_effects")
)


class _STS(_Texts):
    model_id: _Name = ""
    voice_settings: Json[_Settings] = _Settings()
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    remove_background_noise: _Flag = "false"
    file_format: _FileFormat = "other"


class _STT(_Texts):
    model_id: Literal["scribe_v1", "scribe_v2", "scribe_v2_medical", "scribe_v3"]
    language_code: Annotated[str, _language(2, 3)] = ""
    tag_audio_events: _Flag = "true"
    num_speakers: Annotated[int, Field(ge=1, le=32)] = 1
    timestamps_granularity: Literal["none", "word", "character"] = "word"
    diarize: _Flag = "false"
    diarization_threshold: Annotated[float, Field(ge=0.1, le=0.4)] = 0.1
    file_format: _FileFormat = "other"
    temperature: Annotated[float, Field(ge=0, le=2)] = 0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    no_verbatim: _Flag = "false"


_STT_OTHERS = frozenset((
    "additional_formats", "cloud_storage_url", "detect_speaker_roles", "entity_detection", "entity_redaction",
    "entity_redaction_mode", "keyterms", "multichannel_output_style", "numbers_format",
    "secondary_language_codes", "source_url", "transcript_edit", "use_multi_channel", "use_speaker_library",
    "webhook", "webhook_id", "webhook_metadata",
))  # fmt: skip


class _STTQuery(_Texts):
    enable_logging: _Flag = "true"
    token: Any = None


class _Query(_Texts):
    enable_logging: _Flag = "true"
    optimize_streaming_latency: Annotated[int, Field(ge=0, le=4)] = 0


def _query(formats: Collection[str]) -> type[_Fields]:
    literal: Any = Literal
    return create_model("_Query", __base__=_Query, output_format=(literal[tuple(sorted(formats))], ""))


_QUERIES = {True: _query(STREAM_FORMATS), False: _query(FORMATS)}
"""By whether audio is streamed."""


class _OldVoices(_Texts):
    """The first version of the list, which has no pages."""

    show_legacy: _Flag = "false"


class _Voices(_Texts):
    page_size: Annotated[int, Field(ge=1, le=100)] = 10
    include_total_count: _Flag = "true"
    high_quality: _Flag = "false"
    include_custom_rates: _Flag = "false"
    include_live_moderated: _Flag = "false"
    min_notice_period_days: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    sort_direction: Literal["asc", "desc"] = "asc"


_VOICE_FILTERS = frozenset((
    "accent", "age", "category", "collection_id", "fine_tuning_state", "gender", "language",
    "next_page_token", "search", "sort", "use_cases", "voice_ids", "voice_type",
))  # fmt: skip
