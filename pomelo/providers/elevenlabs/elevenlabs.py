"""The wire of ElevenLabs: text to speech, speech to speech, speech to text.

`open_providers` makes it; the engine calls its methods. It reads one key of a route beside the common ones:
`sts_path` (where speech to speech is; default "speech-to-speech", whose other name is tried once where there
is nothing). Voices' names are found in `voices`, forms and answers are made in `elevenlabs_forms` and
`elevenlabs_answers`. It knows no key of a caller, no limit and no price.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import date
from typing import Any, Literal

from pydantic_core import to_json
from yarl import URL

from pomelo.catalog.catalog import DEFAULT_AUDIO_FORMAT
from pomelo.catalog.languages import iso_language
from pomelo.errors import PomeloError
from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    Timestamps,
)
from pomelo.providers import Credentials
from pomelo.providers.base import AudioSource, Event, Job, Options, Probe
from pomelo.providers.elevenlabs.answers import SOUND_MOST, Sound, transcription
from pomelo.providers.elevenlabs.forms import form
from pomelo.providers.elevenlabs.voices import Voices
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, malformed_response
from pomelo.providers.http.sessions import Body
from pomelo.times import today_utc

TRANSCRIPT_MOST = 64 * 1024 * 1024
"""Bytes of a transcript: ten hours of speech, each character timed."""

_IN_A_THREAD = 256 * 1024
"""Bytes from which a transcript is read in a thread, so that other calls have their turn."""

_PAGE = 100
_PAGES_MOST = 50
_LIST_WAIT = 15.0
"""Voices on a page of the account's list, pages that are read, and seconds that all may take."""

_STS_PATH = "speech-to-speech"
_STS_PATHS = {_STS_PATH: "voice-changer", "voice-changer": _STS_PATH}
"""Speech to speech has two names; which of them an account is served under may change."""

_GRANULARITIES = {
    Timestamps.TIMESTAMPS_UNSPECIFIED: "word",
    Timestamps.TIMESTAMPS_NONE: "none",
    Timestamps.TIMESTAMPS_WORD: "word",
    Timestamps.TIMESTAMPS_CHARACTER: "character",
}

_MEANINGS = {
    "voice_not_found": "invalid_parameter",
    "max_character_limit_exceeded": "context_length_exceeded",
    "text_too_long": "context_length_exceeded",
    "rate_limit_exceeded": "provider_unavailable",
    "concurrent_limit_exceeded": "provider_unavailable",
    "too_many_concurrent_requests": "provider_unavailable",
    "system_busy": "provider_unavailable",
    # Our own money, key or rights.
    "quota_exceeded": "provider_failed",
    "insufficient_credits": "provider_failed",
    "invalid_api_key": "provider_failed",
    "needs_authorization": "provider_failed",
    "invalid_authorization_header": "provider_failed",
    "missing_permissions": "provider_failed",
    "unauthorized": "provider_failed",
    "model_not_found": "provider_failed",
    # Types; they count only where code and status say nothing.
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

_SETTINGS = frozenset(("stability", "similarity_boost", "style", "use_speaker_boost", "speed"))


def _blamed(names: list[Any]) -> str | None:
    """The contract's field of a path such as ["body", "voice_settings", "speed"]."""
    for index, name in enumerate(names):
        field = _FIELDS.get(name) if isinstance(name, str) else None
        if field is not None:
            inner = names[index + 1] if len(names) > index + 1 else None
            known = field == "voice_settings" and isinstance(inner, str) and inner in _SETTINGS
            return f"{field}.{inner}" if known else field
    return None


def _read_complaint(body: Any) -> ErrorBody:
    detail = body.get("detail") if isinstance(body, dict) else None
    if isinstance(detail, list):
        # Only the first: a request of ours is wrong in one place, if at all.
        first = detail[0] if detail else None
        where = first.get("loc") if isinstance(first, dict) else None
        return ErrorBody((), _blamed(where) if isinstance(where, list) else None)
    if not isinstance(detail, dict):
        return ErrorBody()
    codes = tuple(word for key in ("code", "status", "type") if isinstance(word := detail.get(key), str))
    if "voice_not_found" in codes:
        return ErrorBody(codes, "voice")
    param = detail.get("param")
    return ErrorBody(codes, _blamed(param.split(".")) if isinstance(param, str) else None)


DIALECT = ErrorMapping("elevenlabs", _read_complaint, _MEANINGS)
_PAID = replace(DIALECT, replays=False)


class _Absence:
    """Reads complaints as the dialect does, and notes one that means: there is nothing at this path."""

    def __init__(self) -> None:
        self.seen = False

    def read(self, body: Any) -> ErrorBody:
        """See Dialect."""
        complaint = _read_complaint(body)
        detail = body.get("detail") if isinstance(body, dict) else None
        self.seen = detail == "Not Found" or (
            "not_found" in complaint.codes and not any(code in _MEANINGS for code in complaint.codes)
        )
        return complaint


class ElevenLabsOptions(Options):
    """What a route may say."""

    sts_path: Literal["speech-to-speech", "voice-changer"] = "speech-to-speech"


class ElevenLabs:
    """ElevenLabs as a provider of speech and of transcripts.

    `sound_most` is the most bytes of an audio file; `today` returns the date in UTC.
    """

    base_url = "https://api.elevenlabs.io"
    options = ElevenLabsOptions
    probe = Probe("/v1/models", "xi-api-key", "")

    def __init__(
        self,
        credentials: Credentials,
        http: Http,
        *,
        sound_most: int = SOUND_MOST,
        today: Callable[[], date] = today_utc,
    ) -> None:
        key = (credentials.api_key or "").strip()
        self.configured = bool(key)
        self._http = http
        self._sound_most = sound_most
        self._base = credentials.base_url.rstrip("/")
        self._headers = {"xi-api-key": key}
        self._json_headers = {"xi-api-key": key, "Content-Type": "application/json"}
        self._voices = Voices(self._listed, today=today)
        self._moved: set[str] = set()
        """Paths of speech to speech that were found empty while the other one answered."""

    async def aclose(self) -> None:
        """Nothing to free: the session is shared."""

    def fit_text_to_speech(self, fitting: Fitting) -> None:
        """Drops a language that the API does not take, which also tells it from the text."""
        if len(iso_language(fitting.get("language_code") or "en")) != 2:
            fitting.drop("language_code", "a language that has an ISO 639-1 code, such as en")

    def fit_speech_to_text(self, fitting: Fitting) -> None:
        """Drops a number of speakers that the API takes only where speakers are told apart."""
        if not fitting.get("diarize"):
            fitting.drop("num_speakers", "left out, unless diarize is true")

    async def text_to_speech(self, job: Job) -> AsyncGenerator[Event, None]:
        """Speaks a text; see JobMethod. The sound is passed on as it comes, streamed or whole.

        Raises:
            PomeloError: by the map in `failures`.
        """
        async with aclosing(self._in_a_voice(job, self._speak)) as events:
            async for event in events:
                yield event

    async def _speak(self, job: Job, voice: str) -> AsyncGenerator[Event, None]:
        given: TextToSpeechInput = job.input
        wanted = given.output_format or DEFAULT_AUDIO_FORMAT
        live = _live(job, wanted)
        url = self._sound_url("text-to-speech", voice, wanted, live)
        body = to_json(text_to_speech_request(job))
        async with aclosing(self._spoken(url, self._json_headers, body, _PAID, wanted, live)) as events:
            async for event in events:
                yield event

    async def _in_a_voice(
        self, job: Job, speak: Callable[[Job, str], AsyncGenerator[Event, None]]
    ) -> AsyncGenerator[Event, None]:
        """The events of `speak`, with the first voice of the wanted name that the vendor still
        has."""
        wanted: str = job.input.voice
        gone: set[str] = set()
        while True:
            voice = await self._voices.find(wanted, job.route.options.get("voices"), gone)
            begun = False
            try:
                async with aclosing(speak(job, voice)) as events:
                    async for event in events:
                        begun = True
                        yield event
            except PomeloError as error:
                # The vendor doesn't have it: nothing was done, and nothing is billed.
                if begun or error.field != "voice" or voice in gone:
                    raise
                gone.add(voice)
            else:
                return

    async def speech_to_speech(self, job: Job) -> AsyncGenerator[Event, None]:
        """Says what was said in another voice; see JobMethod. The upload is read from its file as it is sent.

        Raises:
            PomeloError: by the map in `failures`.
        """
        async with aclosing(self._in_a_voice(job, self._respeak)) as events:
            async for event in events:
                yield event

    async def _respeak(self, job: Job, voice: str) -> AsyncGenerator[Event, None]:
        given: SpeechToSpeechInput = job.input
        wanted = given.output_format or DEFAULT_AUDIO_FORMAT
        live = _live(job, wanted)
        first = str(job.route.options.get("sts_path", _STS_PATH))
        second = _STS_PATHS.get(first)
        if second is not None and first in self._moved:
            first, second = second, None
        absence = _Absence()
        dialect = replace(_PAID, read=absence.read)
        for path in (first, second):
            url = self._sound_url(str(path), voice, wanted, live)
            try:
                with form("audio", _heard(job), speech_to_speech_fields(job)) as body:
                    spoken = self._spoken(url, self._headers, body, dialect, wanted, live)
                    async with aclosing(spoken) as events:
                        async for event in events:
                            if path != first:
                                self._moved.add(first)
                            yield event
            except PomeloError:
                # Where nothing is, nothing was done and nothing is billed: the other name may be asked.
                if path != first or second is None or not absence.seen:
                    raise
            else:
                return

    async def speech_to_text(self, job: Job) -> AsyncGenerator[Event, None]:
        """Writes down what was said; see JobMethod. The upload is read from its file as it is sent.

        Raises:
            PomeloError: by the map in `failures`.
        """
        given: SpeechToTextInput = job.input
        url = URL(f"{self._base}/v1/speech-to-text")
        with form("file", _heard(job), speech_to_text_fields(job)) as body:
            answer, _ = await self._http.fetch(url, self._headers, body, _PAID, most=TRANSCRIPT_MOST)
        if len(answer) < _IN_A_THREAD:
            said = transcription(answer, given, DIALECT)
        else:
            said = await asyncio.to_thread(transcription, answer, given, DIALECT)
        event = Event()
        event.result.transcription.CopyFrom(said)
        yield event

    def _sound_url(self, path: str, voice: str, wanted: str, live: bool) -> URL:
        end = "/stream" if live else ""
        return URL(f"{self._base}/v1/{path}/{voice}{end}").with_query(output_format=wanted)

    async def _spoken(
        self, url: URL, headers: Mapping[str, str], body: Body, dialect: ErrorMapping, wanted: str, live: bool
    ) -> AsyncGenerator[Event, None]:
        """The sound that a request is answered with, as it comes."""
        async with self._http.pieces(url, headers, body, dialect, patient=not live) as stream:
            sound = Sound(wanted, stream.headers, self._sound_most)
            while piece := await stream.read():
                for event in sound.take(piece):
                    yield event
            for event in sound.rest():
                yield event

    async def _listed(self) -> list[tuple[str, str]]:
        """The account's voices."""
        voices: list[tuple[str, str]] = []
        query = {"page_size": str(_PAGE), "include_total_count": "false"}
        try:
            async with asyncio.timeout(_LIST_WAIT):
                for _ in range(_PAGES_MOST):
                    url = URL(f"{self._base}/v2/voices").with_query(query)
                    page = await self._http.whole(url, self._headers, None, DIALECT)
                    token = _add_page(page, voices)
                    if token is None:
                        break
                    query["next_page_token"] = token
        except TimeoutError:
            pass
        else:
            return voices
        raise PomeloError(
            "provider_unavailable", "The provider's list of voices did not come. Use a voice's id"
        )


def text_to_speech_request(job: Job) -> dict[str, Any]:
    """The request body for a text-to-speech job."""
    given: TextToSpeechInput = job.input
    body: dict[str, Any] = {"text": given.text, "model_id": job.route.model}
    if given.language_code:
        body["language_code"] = iso_language(given.language_code)
    settings = _settings(given)
    if settings:
        body["voice_settings"] = settings
    if given.HasField("seed"):
        body["seed"] = given.seed
    return body


def speech_to_speech_fields(job: Job) -> dict[str, str]:
    """The form's fields for a speech-to-speech job, but for the sound."""
    given: SpeechToSpeechInput = job.input
    fields = {"model_id": job.route.model}
    settings = _settings(given)
    if settings:
        fields["voice_settings"] = to_json(settings).decode()
    if given.HasField("seed"):
        fields["seed"] = str(given.seed)
    return fields


def speech_to_text_fields(job: Job) -> dict[str, str]:
    """The form's fields for a speech-to-text job, but for the sound."""
    given: SpeechToTextInput = job.input
    # Without it, noises stand among the words: "(laughter)".
    fields = {"model_id": job.route.model, "tag_audio_events": "false"}
    if given.language_code:
        fields["language_code"] = iso_language(given.language_code)
    if given.diarize:
        fields["diarize"] = "true"
    if given.HasField("num_speakers"):
        fields["num_speakers"] = str(given.num_speakers)
    fields["timestamps_granularity"] = _GRANULARITIES[given.timestamps]
    return fields


def _settings(given: TextToSpeechInput | SpeechToSpeechInput) -> dict[str, Any]:
    """The voice's settings by the vendor's names, which are ours; empty where there are none."""
    return {field.name: value for field, value in given.voice_settings.ListFields()}


def _live(job: Job, wanted: str) -> bool:
    """Whether the vendor's streaming endpoint serves the job; it has no WAV."""
    return job.stream and not wanted.startswith("wav_")


def _heard(job: Job) -> AudioSource:
    if job.audio is None:
        raise RuntimeError("a job of this kind has a sound")
    return job.audio


def _add_page(page: Any, voices: list[tuple[str, str]]) -> str | None:
    """Adds a page's voices; gives the token of the next page, None where this is the last."""
    try:
        for voice in page["voices"]:
            name, voice_id = voice.get("name"), voice["voice_id"]
            if isinstance(name, str) and isinstance(voice_id, str):
                voices.append((name, voice_id))
        token = page.get("next_page_token") if page.get("has_more") else None
        if token is None or isinstance(token, str):
            return token or None
    except (AttributeError, KeyError, TypeError):
        pass
    raise malformed_response("a list of voices that can't be read")
