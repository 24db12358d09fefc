"""ElevenLabs: text to speech, speech to speech, speech to text.

It reads one key of a route: `sts_path`, the path of speech to speech. The default is "speech-to-speech"; if
nothing is there, the vendor's other path is tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from datetime import date
from typing import Any, Literal, TypeVar

from pydantic_core import to_json
from yarl import URL

from pomelo.audio_formats import AudioFormat
from pomelo.catalog.languages import iso_language
from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    TimestampGranularity,
)
from pomelo.protobuf.enums import enum_names
from pomelo.protobuf.times import today_utc
from pomelo.providers.base import Event, Job, Options, Probe, one_event
from pomelo.providers.credentials import Credentials
from pomelo.providers.elevenlabs.errors import CHARGED_MAPPING, ERROR_MAPPING, MOVED_MAPPING
from pomelo.providers.elevenlabs.forms import form
from pomelo.providers.elevenlabs.responses import MAX_AUDIO_BYTES, AudioStream, transcript_event
from pomelo.providers.elevenlabs.voices import Voices
from pomelo.providers.errors import UpstreamError
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorMapping, malformed_response
from pomelo.providers.http.parsing import pick, pick_text
from pomelo.providers.http.protocol import Body
from pomelo.providers.http.responses import CHUNK_BYTES
from pomelo.providers.http.vendor import Vendor

VoicedT = TypeVar("VoicedT", TextToSpeechInput, SpeechToSpeechInput)
"""An input with a voice."""

MAX_TRANSCRIPT_BYTES = 64 * 1024 * 1024
"""The largest transcript: ten hours of speech with the time of each character."""

_THREAD_BYTES = 256 * 1024
"""A transcript of this size or more is parsed in a thread, so that other calls run meanwhile."""

_VOICES_PER_PAGE = 100
_MAX_PAGES = 50
_LIST_TIMEOUT = 15.0
"""Seconds to read all pages of the account's list of voices."""

_STS_PATH = "speech-to-speech"
_STS_PATHS = {_STS_PATH: "voice-changer", "voice-changer": _STS_PATH}
"""The two paths of speech to speech -> the other one. Which of them serves an account may change."""

_GRANULARITIES = {
    TimestampGranularity.TIMESTAMP_GRANULARITY_UNSPECIFIED: "word",
    **enum_names(TimestampGranularity.DESCRIPTOR),
}


class ElevenLabsOptions(Options):
    sts_path: Literal["speech-to-speech", "voice-changer"] = "speech-to-speech"


class ElevenLabs(Vendor):
    """ElevenLabs as a provider of speech and transcripts.

    `max_audio_bytes` limits an audio file; `today` returns the date in UTC.
    """

    base_url = "https://api.elevenlabs.io"
    options = ElevenLabsOptions
    probe = Probe("/v1/models", "xi-api-key", "")

    def __init__(
        self,
        credentials: Credentials,
        http: Http,
        *,
        max_audio_bytes: int = MAX_AUDIO_BYTES,
        today: Callable[[], date] = today_utc,
    ) -> None:
        super().__init__(credentials, http)
        self._max_audio_bytes = max_audio_bytes
        self._voices = Voices(self._list_voices, today=today)
        self._moved = ""
        """The path of speech to speech that was not found while the other path was, or an empty text."""

    def fit_text_to_speech(self, fitting: Fitting) -> None:
        """Drop a language that the API does not accept; it also detects the language of the text."""
        if len(iso_language(fitting.get("language_code") or "en")) != 2:
            fitting.drop("language_code", "a language that has an ISO 639-1 code, such as en")

    def fit_speech_to_text(self, fitting: Fitting) -> None:
        """Drop the number of speakers without diarize, because the API refuses it."""
        if not fitting.get("diarize"):
            fitting.drop("num_speakers", "left out, unless diarize is true")

    def text_to_speech(self, job: Job[TextToSpeechInput]) -> AsyncGenerator[Event, None]:
        """Speak a text. Audio is passed on as it arrives, streamed or whole.

        Raises:
            UpstreamError: by the error map. PomeloError: invalid_parameter for an unknown voice.
        """
        return self._with_voice(job, self._speak)

    def _speak(self, job: Job[TextToSpeechInput], voice: str) -> AsyncGenerator[Event, None]:
        body = to_json(text_to_speech_request(job))
        return self._stream_audio(job, f"text-to-speech/{voice}", self._json_headers, body, CHARGED_MAPPING)

    def speech_to_speech(self, job: Job[SpeechToSpeechInput]) -> AsyncGenerator[Event, None]:
        """Speak the audio in another voice. The upload is read from its file while it is sent.

        Raises:
            UpstreamError: by the error map. PomeloError: invalid_parameter for an unknown voice.
        """
        return self._with_voice(job, self._change_voice)

    async def _with_voice(
        self, job: Job[VoicedT], speak: Callable[[Job[VoicedT], str], AsyncGenerator[Event, None]]
    ) -> AsyncGenerator[Event, None]:
        """The events of `speak`, with the first voice of the job's voice name that the vendor still has."""
        gone: set[str] = set()
        while True:
            voice = await self._voices.find(job.input.voice, job.route.options.get("voices"), gone)
            try:
                async with aclosing(speak(job, voice)) as events:
                    async for event in events:
                        yield event
            except UpstreamError as error:
                # The vendor does not have the voice: it did no work, and charges nothing.
                if error.field != "voice" or voice in gone:
                    raise
                gone.add(voice)
            else:
                return

    async def _change_voice(self, job: Job[SpeechToSpeechInput], voice: str) -> AsyncGenerator[Event, None]:
        first = str(job.route.options.get("sts_path", _STS_PATH))
        second = _STS_PATHS[first]
        if first == self._moved:
            first, second = second, first
        assert job.audio is not None  # as in each job of this type
        for path, error_mapping in ((first, MOVED_MAPPING), (second, CHARGED_MAPPING)):
            try:
                with form("audio", job.audio, speech_to_speech_fields(job)) as body:
                    audio = self._stream_audio(job, f"{path}/{voice}", self._headers, body, error_mapping)
                    async with aclosing(audio) as events:
                        async for event in events:
                            if path != first:
                                self._moved = first
                            yield event
            except UpstreamError as error:
                if error.code != "not_found":
                    raise
            else:
                return

    def speech_to_text(self, job: Job[SpeechToTextInput]) -> AsyncGenerator[Event, None]:
        """Yield the result of `complete_speech_to_text`, because transcripts are not streamed."""
        return one_event(self.complete_speech_to_text, job)

    async def complete_speech_to_text(self, job: Job[SpeechToTextInput]) -> Event:
        """Transcribe audio. The upload is read from its file while it is sent.

        Raises:
            UpstreamError: by the error map.
        """
        assert job.audio is not None  # as in each job of this type
        url = URL(f"{self._base}/v1/speech-to-text")
        with form("file", job.audio, speech_to_text_fields(job)) as body:
            response, _ = await self._http.fetch(
                url, self._headers, body, CHARGED_MAPPING, max_bytes=MAX_TRANSCRIPT_BYTES
            )
        if len(response) < _THREAD_BYTES:
            return transcript_event(response, job.input, CHARGED_MAPPING)
        return await asyncio.to_thread(transcript_event, response, job.input, CHARGED_MAPPING)

    async def _stream_audio(
        self,
        job: Job[Any],
        path: str,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
    ) -> AsyncGenerator[Event, None]:
        audio_format = AudioFormat.of(job.input.output_format)
        live = job.stream and audio_format.codec != "wav"  # the streaming endpoint has no WAV
        url = URL(f"{self._base}/v1/{path}{'/stream' if live else ''}").with_query(
            output_format=audio_format.name
        )
        async with self._http.stream_bytes(url, headers, body, error_mapping, patient=not live) as stream:
            audio = AudioStream(audio_format, stream.headers, self._max_audio_bytes)
            while chunk := await stream.read(CHUNK_BYTES):
                if (event := audio.feed(chunk)) is not None:
                    yield event
            audio.end()

    async def _list_voices(self) -> list[tuple[str, str]]:
        """The names and ids of the account's voices."""
        voices: list[tuple[str, str]] = []
        query = {"page_size": str(_VOICES_PER_PAGE), "include_total_count": "false"}
        try:
            async with asyncio.timeout(_LIST_TIMEOUT):
                for _ in range(_MAX_PAGES):
                    url = URL(f"{self._base}/v2/voices").with_query(query)
                    page = await self._http.request_json(url, self._headers, None, ERROR_MAPPING)
                    token = _add_page(page, voices)
                    if token is None:
                        break
                    query["next_page_token"] = token
        except TimeoutError:
            raise UpstreamError(
                "provider_unavailable",
                "The provider did not send its list of voices. Use a voice's id",
                reason="the vendor did not send its list of voices in time",
            ) from None
        return voices


def text_to_speech_request(job: Job[TextToSpeechInput]) -> dict[str, Any]:
    speech = job.input
    body: dict[str, Any] = {"text": speech.text, "model_id": job.route.model}
    if speech.language_code:
        body["language_code"] = iso_language(speech.language_code)
    if settings := _voice_settings(speech):
        body["voice_settings"] = settings
    if speech.HasField("seed"):
        body["seed"] = speech.seed
    return body


def speech_to_speech_fields(job: Job[SpeechToSpeechInput]) -> dict[str, str]:
    """Return the fields of the form for a speech-to-speech job, without the audio."""
    speech = job.input
    fields = {"model_id": job.route.model}
    if settings := _voice_settings(speech):
        fields["voice_settings"] = to_json(settings).decode()
    if speech.HasField("seed"):
        fields["seed"] = str(speech.seed)
    return fields


def speech_to_text_fields(job: Job[SpeechToTextInput]) -> dict[str, str]:
    """Return the fields of the form for a speech-to-text job, without the audio."""
    options = job.input
    # Otherwise the words include noises, such as "(laughter)".
    fields = {"model_id": job.route.model, "tag_audio_events": "false"}
    if options.language_code:
        fields["language_code"] = iso_language(options.language_code)
    if options.diarize:
        fields["diarize"] = "true"
    if options.HasField("num_speakers"):
        fields["num_speakers"] = str(options.num_speakers)
    fields["timestamps_granularity"] = _GRANULARITIES[options.timestamps]
    return fields


def _voice_settings(speech: TextToSpeechInput | SpeechToSpeechInput) -> dict[str, Any]:
    """The voice settings that are set; the vendor has the same names."""
    return {field.name: value for field, value in speech.voice_settings.ListFields()}


def _add_page(page: Any, voices: list[tuple[str, str]]) -> str | None:
    """Add a page's voices to `voices`, without those that have no name or id. Return the token of the next
    page; None if this is the last."""
    listed = pick(page, "voices")
    token = pick(page, "next_page_token") if pick(page, "has_more") else None
    if isinstance(listed, list) and (token is None or isinstance(token, str)):
        named = [(pick_text(voice, "name"), pick_text(voice, "voice_id")) for voice in listed]
        usable = [voice for voice in named if all(voice)]
        if usable or not listed:
            voices += usable
            return token or None
    raise malformed_response("a list of voices that can't be read")
