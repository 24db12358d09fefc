"""Checks a request as ElevenLabs does: query, JSON and form.

It is strict: it refuses names that the vendor's own client does not have. The values of some fields, such as
those of dictionaries, effects and webhooks, are not checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pomelo.testing.reply import Received

RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
STREAM_FORMATS = frozenset(
    ["mp3_22050_32", "mp3_24000_48", "ulaw_8000", "alaw_8000"]
    + [f"mp3_44100_{kbits}" for kbits in (32, 64, 96, 128, 192)]
    + [f"pcm_{rate}" for rate in RATES]
    + [f"opus_48000_{kbits}" for kbits in (32, 64, 96, 128, 192)]
)
FORMATS = STREAM_FORMATS | {f"wav_{rate}" for rate in RATES}

Problem = dict[str, Any]
Check = Callable[[Any], str | None]
"""Returns the vendor's name of the problem of a value, or None."""


def problem(name: str, *path: str | int, message: str = "It can't be so", value: Any = None) -> Problem:
    """Return an entry of the vendor's list of problems."""
    return {"type": name, "loc": list(path), "msg": message, "input": value}


def find_problems(received: Received, api: str, stream: bool) -> list[Problem]:
    """Return all problems of a request; `api` is tts, sts, stt or voices."""
    if api == "voices":
        return _check_values("query", received.query, _OLD_VOICES if "/v1/" in received.path else _VOICES)
    found = _query(received.query, api, stream)
    if api == "tts":
        if not isinstance(received.body, dict):
            return [*found, problem("json_invalid", "body", message="JSON is needed")]
        return found + _fields(received.body, _TTS, _TTS_OTHERS, ("text",))
    known, others, file = (_STS, frozenset[str](), "audio") if api == "sts" else (_STT, _STT_OTHERS, "file")
    return found + _form(received, known, others, file)


def _query(query: Mapping[str, str], api: str, stream: bool) -> list[Problem]:
    allowed: dict[str, Check] = {"enable_logging": _flag_text}
    if api in ("tts", "sts"):
        allowed["output_format"] = _one_of(*(STREAM_FORMATS if stream else FORMATS))
        allowed["optimize_streaming_latency"] = _whole_text(0, 4)
    if api == "stt":
        allowed["token"] = _anything
    return _check_values("query", query, allowed)


def _fields(
    body: Mapping[str, Any], known: Mapping[str, Check], others: frozenset[str], required: tuple[str, ...]
) -> list[Problem]:
    found = [problem("missing", "body", name) for name in required if body.get(name) is None]
    checked = {name: value for name, value in body.items() if value is not None and name not in others}
    found += _check_values("body", checked, known)
    settings = body.get("voice_settings")
    if isinstance(settings, dict):
        found += _check_values("voice_settings", settings, _SETTINGS, "body")
    return found


def _form(received: Received, known: Mapping[str, Check], others: frozenset[str], file: str) -> list[Problem]:
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
    if file == "file" and "model_id" not in texts:
        found.append(problem("missing", "body", "model_id"))
    found += _check_values(
        "body", {name: value for name, value in texts.items() if name not in others}, known
    )
    if file == "file" and "num_speakers" in texts and texts.get("diarize") != "true":
        found.append(problem("value_error", "body", "num_speakers", message="It requires diarize"))
    if "diarization_threshold" in texts and ("num_speakers" in texts or texts.get("diarize") != "true"):
        found.append(problem("value_error", "body", "diarization_threshold", message="It can't be here"))
    return found


def _check_values(
    part: str, values: Mapping[str, Any], known: Mapping[str, Check], *outer: str
) -> list[Problem]:
    found = []
    for name, value in values.items():
        if name not in known:
            found.append(problem("extra_forbidden", *outer, part, name, message="There is no such field"))
            continue
        error = known[name](value)
        if error is not None:
            found.append(problem(error, *outer, part, name, value=value))
    return found


def _anything(value: Any) -> str | None:
    return None


def _text(min_length: int = 0, max_length: int = 1_000_000) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, str):
            return "string_type"
        if len(value) < min_length:
            return "string_too_short"
        return "string_too_long" if len(value) > max_length else None

    return check


def _one_of(*allowed: str) -> Check:
    return lambda value: None if value in allowed else "literal_error"


def _between(minimum: float, maximum: float, whole: bool) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is not int and (whole or type(value) is not float):
            return "int_type" if whole else "float_type"
        if value < minimum:
            return "greater_than_equal"
        return "less_than_equal" if value > maximum else None

    return check


def _number_text(minimum: float, maximum: float) -> Check:
    inner = _between(minimum, maximum, False)

    def check(value: Any) -> str | None:
        try:
            return inner(float(value))
        except ValueError:
            return "float_parsing"

    return check


def _whole_text(minimum: int, maximum: int) -> Check:
    inner = _between(minimum, maximum, True)

    def check(value: Any) -> str | None:
        return inner(int(value)) if value.isascii() and value.isdecimal() else "int_parsing"

    return check


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "bool_type"


def _flag_text(value: Any) -> str | None:
    return None if value in ("true", "false") else "bool_parsing"


def _object(value: Any) -> str | None:
    return None if isinstance(value, dict) else "dict_type"


def _settings_text(value: str) -> str | None:
    try:
        settings = json.loads(value)
    except ValueError:
        return "json_invalid"
    if not isinstance(settings, dict):
        return "dict_type"
    found = _check_values("voice_settings", settings, _SETTINGS)
    return found[0]["type"] if found else None


def _language(minimum: int, maximum: int) -> Check:
    def check(value: Any) -> str | None:
        fits = (
            isinstance(value, str)
            and minimum <= len(value) <= maximum
            and value.isalpha()
            and value.islower()
        )
        return None if fits else "value_error"

    return check


_SETTINGS: Mapping[str, Check] = {
    "stability": _between(0, 1, False),
    "similarity_boost": _between(0, 1, False),
    "style": _between(0, 1, False),
    "clone_strength": _between(0, 1, False),
    "use_speaker_boost": _flag,
    "speed": _between(0.7, 1.2, False),
}
_TTS: Mapping[str, Check] = {
    "text": _text(1),
    "model_id": _text(1),
    "language_code": _language(2, 2),
    "voice_settings": _object,
    "seed": _between(0, 2**32 - 1, True),
    "previous_text": _text(),
    "next_text": _text(),
    "apply_text_normalization": _one_of("auto", "on", "off"),
    "apply_language_text_normalization": _flag,
    "use_pvc_as_ivc": _flag,
}
_TTS_OTHERS = frozenset(
    ("pronunciation_dictionary_locators", "previous_request_ids", "next_request_ids", "audio_effects")
)
_STS: Mapping[str, Check] = {
    "model_id": _text(1),
    "voice_settings": _settings_text,
    "seed": _whole_text(0, 2**32 - 1),
    "remove_background_noise": _flag_text,
    "file_format": _one_of("pcm_s16le_16", "other"),
}
_STT: Mapping[str, Check] = {
    "model_id": _one_of("scribe_v1", "scribe_v2", "scribe_v2_medical", "scribe_v3"),
    "language_code": _language(2, 3),
    "tag_audio_events": _flag_text,
    "num_speakers": _whole_text(1, 32),
    "timestamps_granularity": _one_of("none", "word", "character"),
    "diarize": _flag_text,
    "diarization_threshold": _number_text(0.1, 0.4),
    "file_format": _one_of("pcm_s16le_16", "other"),
    "temperature": _number_text(0, 2),
    "seed": _whole_text(0, 2**31 - 1),
    "no_verbatim": _flag_text,
}
_STT_OTHERS = frozenset((
    "additional_formats", "cloud_storage_url", "detect_speaker_roles", "entity_detection", "entity_redaction",
    "entity_redaction_mode", "keyterms", "multichannel_output_style", "numbers_format",
    "secondary_language_codes", "source_url", "transcript_edit", "use_multi_channel", "use_speaker_library",
    "webhook", "webhook_id", "webhook_metadata",
))  # fmt: skip
_OLD_VOICES: Mapping[str, Check] = {"show_legacy": _flag_text}
"""The first version of the list, which has no pages."""
_VOICE_FILTERS = (
    "accent", "age", "category", "collection_id", "fine_tuning_state", "gender", "language",
    "next_page_token", "search", "sort", "use_cases", "voice_ids", "voice_type",
)  # fmt: skip
_VOICES: Mapping[str, Check] = {
    "page_size": _whole_text(1, 100),
    "include_total_count": _flag_text,
    "high_quality": _flag_text,
    "include_custom_rates": _flag_text,
    "include_live_moderated": _flag_text,
    "min_notice_period_days": _whole_text(0, 2**31 - 1),
    "sort_direction": _one_of("asc", "desc"),
    **dict.fromkeys(_VOICE_FILTERS, _anything),
}
