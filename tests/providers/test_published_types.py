"""Every request that any valid task may become is one that its vendor has published: method, path, headers,
query and body, with no name that is not declared."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    TimestampGranularity,
    VoiceSettings,
)
from pomelo.gen.v1.text_pb2 import (
    ImageDetail,
    JsonSchema,
    ReasoningEffort,
    TextFormat,
    TextInput,
    ToolChoice,
)
from pomelo.providers.base import AudioSource
from pomelo.testing import Received, VoiceList
from pomelo.testing.form import Part
from tests.providers import image_rig, inputs, text_rig
from tests.providers.client_names import client_names
from tests.providers.elevenlabs import rig
from tests.providers.published import (
    CASES,
    REFUSALS,
    Case,
    Setup,
    check,
    open_providers,
    sent,
)
from tests.providers.rig import KEY, open_provider

EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SMALLEST = AudioSource("audio/pcm;rate=16000", 4, data=b"\0\1\0\1")

_SETTINGS = VoiceSettings(stability=1, similarity_boost=0, style=0.5, use_speaker_boost=False, speed=4)


def _largest_text() -> TextInput:
    schema = JsonSchema(name="n", description="d", schema_json=text_rig.WEATHER.parameters_json, strict=True)
    task = text_rig.largest_input()
    task.MergeFrom(
        text_rig.tools_input(
            tool_choice=ToolChoice(tool="time"),
            parallel_tool_calls=False,
            format=TextFormat(json_schema=schema),
            reasoning_effort=ReasoningEffort.REASONING_EFFORT_HIGH,
        )
    )
    task.messages[1].name = "ann"
    task.messages[1].content[1].image.detail = ImageDetail.IMAGE_DETAIL_LOW
    return task


LARGEST: dict[str, Any] = {
    "text": _largest_text(),
    "image": image_rig.largest_input(),
    "text_to_speech": TextToSpeechInput(
        text="Grüße 🍊\nthere",
        voice="Adam",
        voice_settings=_SETTINGS,
        output_format="opus_48000_192",
        language_code="DE",
        seed=2**32 - 1,
    ),
    "speech_to_speech": SpeechToSpeechInput(
        audio=MediaSource(media_id="media_1"),
        voice="Adam",
        voice_settings=_SETTINGS,
        output_format="pcm_48000",
        seed=2**32 - 1,
    ),
    "speech_to_text": SpeechToTextInput(
        audio=MediaSource(media_id="media_1"),
        language_code="DEU",
        diarize=True,
        num_speakers=32,
        timestamps=TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER,
    ),
}
"""An input of each task type with all fields."""


@pytest.fixture(name="setup", scope="module")
async def _house() -> AsyncIterator[Setup]:
    async with open_providers() as setup:
        yield setup


async def largest_input(setup: Setup, case: Case, stream: bool) -> Received:
    """The request that the richest input becomes."""
    received = await sent(setup, case, LARGEST[case.kind], stream, SMALLEST, text_rig.USER)
    assert received is not None
    return received


@EVERY
async def test_the_largest_request_matches_the_published_api(setup: Setup, case: Case, stream: bool) -> None:
    await check(setup, case, await largest_input(setup, case, stream), stream)


@EVERY
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), stream=st.booleans())
async def test_any_request_matches_the_published_api(
    setup: Setup, case: Case, data: Any, stream: bool
) -> None:
    asked = data.draw(inputs.given(case.model))
    audio, user = data.draw(inputs.audio_sources()), data.draw(inputs.users())
    received = await sent(setup, case, asked, stream, audio, user)
    if received is not None:
        await check(setup, case, received, stream)


async def test_the_list_of_voices_is_requested_as_by_the_vendors_own_client(setup: Setup) -> None:
    pages = [VoiceList((*((f"Nr{n}", f"{n:020d}") for n in range(150)), ("Anna of ours", inputs.MINE)))] * 2
    setup.upstream.reset()
    setup.upstream.unscripted = None
    setup.upstream.script(*pages)
    async with open_provider(rig.MAKE, setup.upstream.elevenlabs_base_url, key=KEY) as provider:
        given = TextToSpeechInput(text="Hi", voice="Anna of ours")
        await rig.read_audio(provider, rig.job(given))
    ours = setup.upstream.requests[:2]
    assert setup.upstream.requests[2].path.endswith(inputs.MINE)
    setup.upstream.reset()
    setup.upstream.unscripted = None
    setup.upstream.script(*pages)
    options: dict[str, Any] = {"page_size": 100, "include_total_count": False}
    page = await setup.elevenlabs.voices.search(**options)
    await setup.elevenlabs.voices.search(**options, next_page_token=page.next_page_token)
    for mine, theirs in zip(ours, setup.upstream.requests, strict=True):
        assert (mine.method, mine.path, mine.query) == (theirs.method, theirs.path, theirs.query)
        assert mine.headers["xi-api-key"] == theirs.headers["xi-api-key"] == KEY


# --- the other vendors' own clients, too, make the same request of the same parameters


async def _openai(setup: Setup, received: Received) -> None:
    import openai  # here as below, because these imports take up to two seconds

    async with openai.AsyncOpenAI(base_url=setup.upstream.openai_base_url, api_key=KEY) as client:
        answer: Any = await client.chat.completions.create(**received.body)
        if received.body.get("stream"):
            await answer.close()


async def _anthropic(setup: Setup, received: Received) -> None:
    import anthropic

    body = dict(received.body)
    # The client asks for a later version of the API, which lacks it. A model that thinks does not take it.
    more = {"temperature": body.pop("temperature")} if "temperature" in body else {}
    headers = {"anthropic-version": "2023-06-01", "x-api-key": KEY}
    url = setup.upstream.anthropic_base_url
    async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY, default_headers=headers) as client:
        answer: Any = await client.messages.create(**body, extra_body=more)
        if body.get("stream"):
            await answer.close()


async def _mistral(setup: Setup, received: Received) -> None:
    import mistralai.client

    body = dict(received.body)
    url = setup.upstream.mistral_base_url
    async with mistralai.client.Mistral(server_url=url, api_key=KEY) as client:
        body = client_names("mistral", body)
        if body.pop("stream", False):
            async with await client.chat.stream_async(**body):
                pass
        else:
            await client.chat.complete_async(**body)


async def _replicate(setup: Setup, received: Received) -> None:
    from replicate.client import Client as Replicate

    client = Replicate(api_token=KEY, base_url=setup.upstream.replicate_base_url)
    name = "black-forest-labs/flux-schnell"
    await client.models.predictions.async_create(name, wait=5, **received.body)


CLIENTS = {"openai": _openai, "anthropic": _anthropic, "mistral": _mistral, "replicate": _replicate}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.route.provider in CLIENTS], ids=lambda case: case.name
)
async def test_the_vendors_own_client_makes_the_same_request(setup: Setup, case: Case, stream: bool) -> None:
    ours = await largest_input(setup, case, stream)
    await CLIENTS[case.route.provider](setup, ours)
    theirs = setup.upstream.requests[-1]
    assert theirs is not ours
    assert (theirs.method, theirs.target) == (ours.method, ours.target)
    assert plain(theirs.body) == plain(ours.body)
    # One client sends its key in another of the two headers that its vendor takes.
    ways = ("prefer", "content-type", *([] if case.route.provider == "anthropic" else ["authorization"]))
    assert [theirs.headers.get(name) for name in ways] == [ours.headers.get(name) for name in ways]


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """A body without what some client says though it is the default: no stream, no begun answer, and that all
    tool calls are the first."""
    body = {name: value for name, value in body.items() if (name, value) != ("stream", False)}
    if "messages" in body:
        body["messages"] = [
            {
                name: _plain_calls(name, value)
                for name, value in message.items()
                if (name, value) != ("prefix", False)
            }
            for message in body["messages"]
        ]
    return body


def _plain_calls(name: str, value: Any) -> Any:
    if name != "tool_calls":
        return value
    return [{key: item for key, item in call.items() if (key, item) != ("index", 0)} for call in value]


# --- the check would notice

OF_THE_CALLER = ("parameters", "schema", "input_schema", "input")
"""Fields that contain JSON of the caller's, with any names."""


def spots(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of the objects in a body."""
    if isinstance(value, dict):
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        if key not in OF_THE_CALLER:
            yield from spots(item, *path, key)


def changed(received: Received) -> Iterator[tuple[str, Received]]:
    """A request with one fault each, and what the fault is."""
    for path in spots(received.body):
        body = deepcopy(received.body)
        place = body
        for key in path:
            place = place[key]
        place["undeclared"] = 1
        yield f"a name at {path}", replace(received, body=body)
    for name in received.body or ():
        yield f"another type of {name}", replace(received, body=received.body | {name: {"undeclared": 1}})
    if received.form is not None:
        part = Part("undeclared", None, "text/plain", "1", 1, "", b"1")
        yield "a field of the form", replace(received, form=(*received.form, part))
        yield "a field twice", replace(received, form=(*received.form, received.form[0]))
        yield "no file", replace(received, form=received.form[:-1])
    more = "&" if "?" in received.target else "?"
    target = f"{received.target}{more}undeclared=1"
    yield "a parameter", replace(received, target=target, query={**received.query, "undeclared": "1"})
    yield "a header", replace(received, headers={**received.headers, "X-Undeclared": "1"})
    for name in received.headers:
        if name.lower() in ("authorization", "x-api-key", "x-key", "xi-api-key", "content-type"):
            less = {key: value for key, value in received.headers.items() if key != name}
            yield f"no {name}", replace(received, headers=less)
    yield "another path", replace(received, path=received.path + "/x")
    yield "another method", replace(received, method="PUT")


@EVERY
async def test_a_request_that_does_not_match_the_published_api_fails(
    setup: Setup, case: Case, stream: bool
) -> None:
    received = await largest_input(setup, case, stream)
    unnoticed = []
    for fault, wrong in changed(received):
        try:
            await check(setup, case, wrong, stream)
        except REFUSALS:
            continue
        unnoticed.append(fault)
    assert unnoticed == []
