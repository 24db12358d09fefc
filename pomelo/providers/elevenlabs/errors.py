"""How ElevenLabs reports failures: what its codes mean, and the fields that they name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pomelo.providers.http.errors import ErrorBody, ErrorMapping
from pomelo.providers.http.parsing import pick, pick_list, pick_text

_MEANINGS = {
    "voice_not_found": "invalid_parameter",
    "voice_does_not_exist": "invalid_parameter",
    "invalid_voice_id": "invalid_parameter",
    "invalid_voice_settings": "invalid_parameter",
    "invalid_content": "invalid_parameter",
    "invalid_audio_format": "invalid_parameter",
    "empty_text": "invalid_parameter",
    "content_against_policy": "content_policy_violation",
    "max_character_limit_exceeded": "context_length_exceeded",
    "text_too_long": "context_length_exceeded",
    "rate_limit_exceeded": "provider_unavailable",
    "concurrent_limit_exceeded": "provider_unavailable",
    "too_many_concurrent_requests": "provider_unavailable",
    "system_busy": "provider_unavailable",
    # Our account, key or permissions.
    "quota_exceeded": "provider_failed",
    "insufficient_credits": "provider_failed",
    "invalid_api_key": "provider_failed",
    "needs_authorization": "provider_failed",
    "invalid_authorization_header": "provider_failed",
    "missing_permissions": "provider_failed",
    "unauthorized": "provider_failed",
    "model_not_found": "provider_failed",
    # Types: they count only if code and status are unknown.
    "payment_required": "provider_failed",
    "authentication_error": "provider_failed",
    "authorization_error": "provider_failed",
    "rate_limit_error": "provider_unavailable",
    "internal_error": "provider_unavailable",
    "service_unavailable": "provider_unavailable",
}

_FIELDS = {
    "text": "text",
    "voice_id": "voice",
    "voice_settings": "voice_settings",
    "output_format": "output_format",
    "language_code": "language_code",
    "seed": "seed",
    "audio": "audio",
    "file": "audio",
    "diarize": "diarize",
    "num_speakers": "num_speakers",
    "timestamps_granularity": "timestamps",
}
"""The vendor's name of a parameter -> the contract's."""

_PARAMS = {
    "voice_not_found": "voice_id",
    "voice_does_not_exist": "voice_id",
    "invalid_voice_id": "voice_id",
    "invalid_voice_settings": "voice_settings",
    "invalid_content": "audio",
    "invalid_audio_format": "audio",
    "empty_text": "text",
    "max_character_limit_exceeded": "text",
    "text_too_long": "text",
}
"""The vendor's code -> the parameter that it is about, which the error need not name."""

_SETTINGS = frozenset(("stability", "similarity_boost", "style", "use_speaker_boost", "speed"))


def _field_of(names: list[Any]) -> str | None:
    """The contract's field for a path such as ["body", "voice_settings", "speed"]."""
    for index, name in enumerate(names):
        field = _FIELDS.get(name) if isinstance(name, str) else None
        if field is not None:
            inner = names[index + 1] if len(names) > index + 1 else None
            known = field == "voice_settings" and isinstance(inner, str) and inner in _SETTINGS
            return f"{field}.{inner}" if known else field
    return None


def _read_error_body(body: Any) -> ErrorBody:
    detail = pick(body, "detail")
    if isinstance(detail, list):
        # Only the first: a request of ours has at most one invalid field.
        return ErrorBody((), _field_of(pick_list(detail, 0, "loc")))
    codes = (pick_text(detail, "code"), pick_text(detail, "status"), pick_text(detail, "type"))
    about = (_PARAMS[code] for code in codes if code in _PARAMS)
    path = next(about, pick_text(detail, "param"))
    return ErrorBody(codes, _field_of(path.split(".")))


ERROR_MAPPING = ErrorMapping("elevenlabs", _read_error_body, _MEANINGS)
CHARGED_MAPPING = replace(ERROR_MAPPING, replays=False)
"""Errors of requests that are charged."""

MOVED_MAPPING = replace(CHARGED_MAPPING, statuses={404: "not_found"})
"""The same for a path that the vendor may not have: it then did no work, and charges nothing."""
