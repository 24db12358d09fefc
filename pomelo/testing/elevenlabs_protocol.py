"""A fake of ElevenLabs, from the vendor's own client and documentation: most tests script a `Speech` or a
`Transcript`. Its paths begin with `PREFIX`, so that they differ from those of other vendors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pomelo.audio_formats import AudioFormat
from pomelo.testing.audio import packets
from pomelo.testing.broken import BODY, halves
from pomelo.testing.elevenlabs_checks import find_problems, problem
from pomelo.testing.form import Part
from pomelo.testing.reply import Received, Reply, Script, Step, VendorFaults, VendorProtocol, json_reply
from pomelo.testing.text_answer import as_steps

PREFIX = "/elevenlabs"

_ID = re.compile(r"[A-Za-z0-9]{20}")
_PATHS = re.compile(
    r"/v1/(?P<path>text-to-speech|speech-to-speech|voice-changer)/(?P<voice>[^/]+)(?P<stream>/stream)?"
    r"|/v1/(?P<stt>speech-to-text)|/(?P<voices>v[12]/voices)"
)
_MAX_CHARACTERS = 10_000
_CHARACTER_SECONDS = 0.06
_WORD_SECONDS = 0.25

At = Mapping[int, Step | Sequence[Step]]


@dataclass(frozen=True, slots=True)
class Speech:
    """A script that answers a speech request with playable audio, in the requested format.

    `size` is in bytes; the default is 0.06 s for each character of the text. `at` inserts steps after a
    number of packets; `before` are steps before the head. `packet` is the approximate size of a packet. With
    `length`, the response has a Content-Length in place of chunks.
    """

    size: int | None = None
    at: At = field(default_factory=dict)
    before: tuple[Step, ...] = ()
    packet: int = 4096
    length: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, received: Received) -> Reply:
        audio = self.audio(received)
        headers = {
            "Content-Type": _format(received).content_type.partition(";")[0],
            "request-id": "req_test0001",
            "character-cost": str(len(_text(received))),
        }
        if self.length:
            headers["Content-Length"] = str(sum(map(len, audio)))
        steps: list[Step] = [*as_steps(self.at.get(0, ()))]
        for number, packet in enumerate(audio, 1):
            steps.append(packet)
            steps += as_steps(self.at.get(number, ()))
        return Reply(headers={**headers, **self.headers}, before=self.before, steps=tuple(steps))

    def audio(self, received: Received) -> list[bytes]:
        """Return the packets of the audio for a request."""
        audio_format, text, size = _format(received), _text(received), self.size
        if size is None:
            size = max(1, round(len(text) * _CHARACTER_SECONDS * audio_format.bytes_per_second))
        return packets(audio_format.name, size, text, self.packet)


@dataclass(frozen=True, slots=True)
class Transcript:
    """A script that answers a speech-to-text request.

    The default `text` is the size of the upload and its SHA-256, to compare them with what was sent. Several
    `speakers` speak a word in turn; `noises` follow the last word if the request asks for them. The steps
    `at` 0 are sent before the body, those at 1 in its middle.
    """

    text: str | None = None
    language: str = "eng"
    speakers: int = 1
    noises: tuple[str, ...] = ("(laughter)",)
    at: At = field(default_factory=dict)
    before: tuple[Step, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the body to replace."""

    def __call__(self, received: Received) -> Reply:
        reply = json_reply({**self._body(received), **self.more})
        (start,), (rest,) = halves(reply.steps)
        steps = (*as_steps(self.at.get(0, ())), start, *as_steps(self.at.get(1, ())), rest)
        return replace(reply, before=self.before, steps=steps)

    def _body(self, received: Received) -> dict[str, Any]:
        form = {part.name: part for part in received.form or ()}
        text = self.text
        if text is None:
            upload = form["file"]
            text = f"{upload.size} bytes with SHA-256 {upload.sha256}"
        noises = self.noises if _value(form, "tag_audio_events", "true") == "true" else ()
        granularity = _value(form, "timestamps_granularity", "word")
        diarized = _value(form, "diarize", "false") == "true"
        words: list[dict[str, Any]] = []
        spoken = text.split()
        for number, word_text in enumerate((*spoken, *noises)):
            start = number * _WORD_SECONDS
            speaker = f"speaker_{number % self.speakers}" if diarized else None
            if number:
                words.append(_word(" ", start - 0.05, 0.05, "spacing", speaker))
            word_type = "audio_event" if number >= len(spoken) else "word"
            words.append(_word(word_text, start, _WORD_SECONDS - 0.05, word_type, speaker))
        for word in words:
            if granularity == "character":
                each = (word["end"] - word["start"]) / len(word["text"])
                word["characters"] = [
                    {
                        "text": character,
                        "start": round(word["start"] + each * at, 3),
                        "end": round(word["start"] + each * (at + 1), 3),
                    }
                    for at, character in enumerate(word["text"])
                ]
            elif granularity == "none":
                word["start"] = word["end"] = None
        return {
            "language_code": self.language,
            "language_probability": 0.98,
            "text": " ".join((text, *noises)),
            "words": words,
            "transcription_id": "tr_test0001",
            "audio_duration_secs": round((len(spoken) + len(noises)) * _WORD_SECONDS, 3),
        }


@dataclass(frozen=True, slots=True)
class VoiceList:
    """A script that answers with the account's voices, (name, id), in pages of the requested size."""

    voices: tuple[tuple[str, str], ...] = (("Adam - Dominant, Firm", "pNInz6obpgDQGcFmaJgB"),)
    before: tuple[Step, ...] = ()

    def __call__(self, received: Received) -> Reply:
        size = int(received.query.get("page_size", "10"))
        start = int(received.query.get("next_page_token") or "0")
        if received.path.endswith("/v1/voices"):
            size = len(self.voices)
        page: list[dict[str, Any]] = [
            {"voice_id": voice_id, "name": name, "category": "premade", "labels": {}, "description": None}
            for name, voice_id in self.voices[start : start + size]
        ]
        body: dict[str, Any] = {"voices": page}
        if received.path.endswith("/v2/voices"):
            end = start + size
            more = end < len(self.voices)
            body |= {"has_more": more, "total_count": len(self.voices)}
            body["next_page_token"] = str(end) if more else None
        return replace(json_reply(body), before=self.before)


def error_reply(
    status: int,
    code: str = "",
    *,
    error_type: str = "validation_error",
    legacy: str | None = None,
    message: str = "It can't be done",
    param: str | None = None,
    shape: Literal["new", "old", "text"] = "new",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return a refusal in one of the vendor's shapes; `error_type` is its `type`, `legacy` its `status`."""
    detail: Any = {
        "type": error_type,
        "code": code,
        "message": message,
        "status": code if legacy is None else legacy,
        "request_id": "rq_test0001",
        "param": param,
    }
    if shape == "old":
        detail = {"status": detail["status"], "message": message}
    elif shape == "text":
        detail = message
    return json_reply({"detail": detail}, status, headers)


def validation_reply(*problems: Mapping[str, Any]) -> Reply:
    """Return a refusal with the vendor's list of problems."""
    return json_reply({"detail": problems}, 422)


def refused(received: Received, api_key: str | None) -> Reply | None:
    """Return the vendor's refusal of an invalid request; None for a valid one. Without `api_key`, any key is
    valid."""
    path = _PATHS.fullmatch(received.path.removeprefix(PREFIX))
    if path is None:
        return error_reply(404, message="Not Found", shape="text")
    if received.method != ("GET" if path["voices"] else "POST"):
        return error_reply(405, message="Method Not Allowed", shape="text")
    api = "voices" if path["voices"] else "stt" if path["stt"] else "tts"
    if path["path"] in ("speech-to-speech", "voice-changer"):
        api = "sts"
    # The vendor checks the request before the key.
    if found := find_problems(received, api, path["stream"] is not None):
        return validation_reply(*found)
    key = received.headers.get("xi-api-key")
    if not key:
        return error_reply(
            401, "unauthorized", error_type="authentication_error", legacy="needs_authorization"
        )
    if api_key is not None and key != api_key:
        return error_reply(401, "unauthorized", error_type="authentication_error", legacy="invalid_api_key")
    if path["voice"] and not _ID.fullmatch(path["voice"]):
        return error_reply(404, "voice_not_found", error_type="not_found", param="voice_id")
    if api == "tts":
        if len(received.body["text"]) > _MAX_CHARACTERS:
            return error_reply(400, "max_character_limit_exceeded", param="text")
        if received.body.get("language_code") and "multilingual_v2" in received.body.get("model_id", ""):
            return error_reply(400, "invalid_parameters", param="language_code")
    return None


def unscripted(received: Received) -> Reply | None:
    """Return the reply to a valid request for the list of voices; None for any other request."""
    path = _PATHS.fullmatch(received.path.removeprefix(PREFIX))
    if path is None or not path["voices"] or refused(received, None) is not None:
        return None
    return VoiceList()(received)


def _default(received: Received) -> Reply:
    if received.path.endswith("/voices"):
        return VoiceList()(received)
    return (Transcript() if received.path.endswith("/speech-to-text") else Speech())(received)


def _format(received: Received) -> AudioFormat:
    return AudioFormat.of(received.query.get("output_format", "mp3_44100_128"))


def _text(received: Received) -> str:
    """The text of a request, or the digest of its audio."""
    if isinstance(received.body, dict):
        return str(received.body.get("text", ""))
    return next((part.sha256 for part in received.form or () if part.filename is not None), "")


def _value(form: Mapping[str, Part], name: str, default: str) -> str:
    part = form.get(name)
    return default if part is None or part.text is None else part.text


def _word(text: str, start: float, length: float, word_type: str, speaker: str | None) -> dict[str, Any]:
    return {
        "text": text,
        "start": round(start, 3),
        "end": round(start + length, 3),
        "type": word_type,
        "speaker_id": speaker,
        "logprob": -0.01,
    }


_FAULTS: Mapping[str, Script] = {
    "an error with 200": error_reply(200, "strange", message=BODY),
    "out of money": error_reply(401, "quota_exceeded", shape="old", message=BODY),
    "too many concurrent tasks": error_reply(
        429,
        "concurrent_limit_exceeded",
        error_type="rate_limit_error",
        legacy="too_many_concurrent_requests",
        message=BODY,
    ),
    "unknown key": error_reply(
        401, "unauthorized", error_type="authentication_error", legacy="invalid_api_key", message=BODY
    ),
    "unknown model": error_reply(404, "model_not_found", error_type="not_found", message=BODY),
}
_SPEECH_FAULTS: Mapping[str, Script] = {
    **_FAULTS,
    "an invalid value": validation_reply(problem("x", "body", "voice_settings", "speed", value=BODY)),
    "unknown voice": error_reply(
        404, "voice_not_found", error_type="not_found", param="voice_id", message=BODY
    ),
}
_NO_TEXT = {
    "against the policy": "the vendor documents no such refusal",
    "too long": "audio has no characters; too much of it is 413",
}

PROTOCOL = VendorProtocol(
    "elevenlabs",
    lambda received: received.path.startswith(PREFIX + "/"),
    refused,
    _default,
    lambda status, message: error_reply(status, message=message),
    {
        "text_to_speech": VendorFaults(
            {
                **_SPEECH_FAULTS,
                "too long": error_reply(400, "max_character_limit_exceeded", message=BODY),
                "against the policy": error_reply(403, "content_against_policy", shape="old", message=BODY),
            }
        ),
        "speech_to_speech": VendorFaults(_SPEECH_FAULTS, _NO_TEXT),
        "speech_to_text": VendorFaults(
            {
                **_FAULTS,
                "an invalid value": validation_reply(problem("x", "body", "num_speakers", value=BODY)),
            },
            _NO_TEXT,
        ),
    },
)
