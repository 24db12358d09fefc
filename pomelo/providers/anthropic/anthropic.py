"""Anthropic: the Messages API, in the version that still accepts sampling parameters.

Its base URL has no /v1. It reads three keys of a route: `sampling` ("both": the model accepts temperature and
top_p together; by default only the temperature is sent), `thinking` ("adaptive": a reasoning_effort makes the
model think) and `extra` (a table of further fields to send). The API has no seed, no penalties, and no format
for any JSON object.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

from yarl import URL

from pomelo.gen.v1.text_pb2 import ReasoningEffort, TextInput, ToolCall
from pomelo.providers.anthropic.errors import ERROR_MAPPING
from pomelo.providers.anthropic.request import encode_request, max_tokens, thinks
from pomelo.providers.anthropic.responses import MessageStream, parse_message
from pomelo.providers.anthropic.schemas import output_schema
from pomelo.providers.base import Event, Extra, Job, Options, Probe, one_event
from pomelo.providers.credentials import Credentials
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.vendor import Vendor
from pomelo.providers.text import completed_text, stream_text
from pomelo.providers.text.input_texts import LONG_INPUT_BYTES

_VERSION = "2023-06-01"
"""The later version refuses temperature and top_p for every model."""

_MAX_WHOLE_TOKENS = 21_000
"""Tokens of output above which the vendor asks clients to stream: a whole response could take more than ten
minutes."""

_NAMES = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop_sequences",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "format": "output_config",
    "reasoning_effort": "output_config",
    "user": "metadata",
}
"""The contract's name of a parameter -> the vendor's."""


class AnthropicOptions(Options):
    sampling: Literal["both"] | None = None
    thinking: Literal["adaptive"] | None = None
    extra: Extra | None = None


class Anthropic(Vendor):
    base_url = "https://api.anthropic.com"
    options = AnthropicOptions
    probe = Probe("/v1/models", "x-api-key", "", {"anthropic-version": _VERSION})

    def __init__(self, credentials: Credentials, http: Http) -> None:
        super().__init__(credentials, http)
        self._url = URL(self._base + "/v1/messages")

    def fit_text(self, fitting: Fitting) -> None:
        """Adjust an input to what the API accepts, and to the fields that the operator has fixed."""
        for name in ("seed", "presence_penalty", "frequency_penalty"):
            fitting.drop(name)
        options = fitting.route.options
        if fitting.get("format") and output_schema(fitting.input.format.json_schema) is None:
            fitting.drop("format", "left out, or a json_schema whose objects have named properties")
        if fitting.get("reasoning_effort") == ReasoningEffort.REASONING_EFFORT_MINIMAL:
            fitting.replace("reasoning_effort", ReasoningEffort.REASONING_EFFORT_LOW, "none, low or higher")
        if thinks(fitting.input, options):
            for name in ("temperature", "top_p"):
                fitting.drop(name, "left out: the model does not take it while it thinks")
        if fitting.get("temperature") is not None and options.get("sampling") != "both":
            fitting.drop("top_p", "left out beside temperature: the model takes one of the two")
        fitting.drop_items("stop", lambda text: not text.strip(), "strings that are not blank")
        fitting.override(_NAMES, options.get("extra"))

    def text(self, job: Job[TextInput]) -> AsyncGenerator[Event, None]:
        """Answer a conversation.

        A whole response that may become very long is requested as a stream and collected. A complete response
        without a credible count of tokens has no usage.

        Raises:
            UpstreamError: by the error map; invalid_parameter if there is no message but the system's.
        """
        return self._stream(job) if job.stream else one_event(self.complete_text, job)

    async def complete_text(self, job: Job[TextInput]) -> Event:
        """As `text`, without a stream."""
        if max_tokens(job) > _MAX_WHOLE_TOKENS:
            return await self._collect(job)
        message = await self._http.request_json(
            self._url, self._json_headers, encode_request(job, stream=False), ERROR_MAPPING, surrogates=True
        )
        return parse_message(message)

    def _stream(self, job: Job[TextInput]) -> AsyncGenerator[Event, None]:
        job.report.thinks = reasons = thinks(job.input, job.route.options)
        return stream_text(
            lambda: self._http.stream_events(
                self._url,
                self._json_headers,
                encode_request(job, stream=True),
                ERROR_MAPPING,
                patient=reasons or job.input.ByteSize() > LONG_INPUT_BYTES,
            ),
            MessageStream(job.report),
        )

    async def _collect(self, job: Job[TextInput]) -> Event:
        text = bytearray()  # in a list, each chunk would take sixty bytes more
        calls: list[tuple[ToolCall, bytearray]] = []
        turn = self._http.turns.stream()
        async with aclosing(self._stream(job)) as events:
            async for event in events:
                if turn.over():
                    await turn.next()
                text += event.text_delta.text.encode()
                if event.HasField("tool_call_delta"):
                    piece = event.tool_call_delta
                    if piece.id:
                        calls.append((ToolCall(id=piece.id, name=piece.name), bytearray()))
                    calls[piece.index][1].extend(piece.arguments_json.encode())
        for call, arguments in calls:
            call.arguments_json = arguments.decode()
        result = event.completed
        usage = result.usage if result.HasField("usage") else None
        return completed_text(text.decode(), result.text.finish_reason, usage, [call for call, _ in calls])
