"""Requests of the OpenAI provider: every field of the contract, and no value that the vendor would refuse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256

import pytest

from pomelo.catalog.catalog import Catalog, Route
from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import ContentPart, ContentParts, ImageUrl, Message, Role, TextInput
from pomelo.testing import FaultUpstream, Received
from tests.providers.openai.rig import CLASSIC, KEY, deltas, failure, job, open_provider

PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(name="vendor")
async def _vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream(api_key=KEY) as server:
        yield server


def largest_input() -> TextInput:
    """Returns a text input that sets every field."""
    return TextInput(
        messages=[
            Message(role=Role.ROLE_SYSTEM, content="Be brief. Ünïcödé 🍊"),
            Message(
                role=Role.ROLE_USER,
                parts=ContentParts(
                    parts=[ContentPart(text="What is it?"), ContentPart(image_url=ImageUrl(url=PNG))]
                ),
            ),
            Message(role=Role.ROLE_ASSISTANT, content=""),
            Message(role=Role.ROLE_ASSISTANT, parts=ContentParts(parts=[ContentPart(text="A dot.")])),
            Message(role=Role.ROLE_USER, content="Sure?"),
        ],
        max_tokens=100,
        temperature=0.7,
        top_p=0.9,
        stop=["END", "\n\n"],
        seed=2**53 - 1,
        presence_penalty=-2,
        frequency_penalty=0.5,
        user="alice@example.com",
    )


MESSAGES = [
    {"role": "system", "content": "Be brief. Ünïcödé 🍊"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": PNG}},
        ],
    },
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": [{"type": "text", "text": "A dot."}]},
    {"role": "user", "content": "Sure?"},
]


async def sent(
    vendor: FaultUpstream,
    text_input: TextInput,
    *,
    stream: bool = False,
    route: Route = CLASSIC,
    max_output_tokens: int = 0,
) -> Received:
    """The request that a job became; it was taken and answered."""
    async with open_provider(vendor.openai_base_url) as provider:
        answer = await deltas(
            provider, job(text_input, stream=stream, route=route, max_output_tokens=max_output_tokens)
        )
    assert answer[-1].finish_reason
    return await vendor.received()


async def test_the_largest_request_is_exactly_this(vendor: FaultUpstream) -> None:
    received = await sent(vendor, largest_input(), stream=True)
    assert received.body == {
        "model": "gpt-4.1",
        "messages": MESSAGES,
        "max_tokens": 100,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 2**53 - 1,
        "presence_penalty": -2.0,
        "frequency_penalty": 0.5,
        "stop": ["END", "\n\n"],
        "safety_identifier": "alice@example.com",
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    assert (received.method, received.path) == ("POST", "/v1/chat/completions")


async def test_whole_numbers_stay_whole_in_the_request(vendor: FaultUpstream) -> None:
    received = await sent(vendor, largest_input())
    assert b'"max_tokens":100,' in received.raw
    assert b'"seed":9007199254740991,' in received.raw


async def test_the_smallest_request_has_no_field_that_the_caller_did_not_set(vendor: FaultUpstream) -> None:
    received = await sent(vendor, TextInput(messages=[Message(role=Role.ROLE_USER, content="Hi")]))
    assert received.body == {"model": "gpt-4.1", "messages": [{"role": "user", "content": "Hi"}]}


async def test_a_zero_that_the_caller_set_is_sent(vendor: FaultUpstream) -> None:
    text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content="Hi")], temperature=0, seed=0)
    body = (await sent(vendor, text_input)).body
    assert (body["temperature"], body["seed"]) == (0, 0)


async def test_a_route_drops_clamps_and_renames(vendor: FaultUpstream) -> None:
    route = Route(
        "openai",
        "gpt-5.6-sol",
        drop=frozenset(("stop", "presence_penalty", "frequency_penalty", "user", "seed")),
        clamp={"temperature": (0, 0.5, 0), "max_tokens": (16, 64, 0)},
        options={"max_tokens_field": "max_completion_tokens", "reasoning_effort": "none"},
    )
    assert (await sent(vendor, largest_input(), route=route)).body == {
        "model": "gpt-5.6-sol",
        "messages": MESSAGES,
        "max_completion_tokens": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "reasoning_effort": "none",
    }


async def test_max_tokens_above_the_models_limit_become_the_limit(vendor: FaultUpstream) -> None:
    assert (await sent(vendor, largest_input(), max_output_tokens=50)).body["max_tokens"] == 50


@pytest.mark.parametrize("name", [model.name for model in Catalog.load().models.values()])
async def test_no_row_of_the_catalogue_makes_a_request_that_the_vendor_would_refuse(
    vendor: FaultUpstream, name: str
) -> None:
    routes = [route for route in Catalog.load().resolve(name).routes if route.provider == "openai"]
    for route in routes:
        for stream in (False, True):
            assert (await sent(vendor, largest_input(), stream=stream, route=route)).body[
                "model"
            ] == route.model


async def test_only_our_own_headers_are_sent(vendor: FaultUpstream) -> None:
    received = await sent(vendor, largest_input(), stream=True)
    assert received.headers["Authorization"] == f"Bearer {KEY}"
    assert received.headers["Content-Type"] == "application/json"
    assert received.headers["Accept-Encoding"] == "identity"
    assert {name.lower() for name in received.headers} == {
        "accept", "accept-encoding", "authorization", "content-length", "content-type", "host", "user-agent",
    }  # fmt: skip


@pytest.mark.parametrize("length", [1, 64])
async def test_an_end_user_id_that_fits_is_sent_unchanged(vendor: FaultUpstream, length: int) -> None:
    text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content="Hi")], user="ü" * length)
    assert (await sent(vendor, text_input)).body["safety_identifier"] == "ü" * length


async def test_an_end_user_id_that_is_too_long_is_sent_as_a_digest(vendor: FaultUpstream) -> None:
    text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content="Hi")], user="ü" * 65)
    body = (await sent(vendor, text_input)).body
    assert body["safety_identifier"] == sha256(("ü" * 65).encode()).hexdigest()
    assert len(body["safety_identifier"]) == 64
    assert "user" not in body


@pytest.mark.filterwarnings("error::ResourceWarning")
async def test_a_request_of_several_mebibytes_is_sent_completely(vendor: FaultUpstream) -> None:
    data_uri = "data:image/png;base64," + "A" * 3_000_000
    parts = ContentParts(parts=[ContentPart(image_url=ImageUrl(url=data_uri))])
    received = await sent(vendor, TextInput(messages=[Message(role=Role.ROLE_USER, parts=parts)]))
    assert received.body["messages"][0]["content"][0]["image_url"]["url"] == data_uri


async def test_the_input_is_not_changed(vendor: FaultUpstream) -> None:
    text_input = largest_input()
    await sent(vendor, text_input, max_output_tokens=5)
    assert text_input == largest_input()


@pytest.mark.parametrize("base", ["/v1", "/v1/"])
async def test_a_base_url_may_end_with_a_slash(vendor: FaultUpstream, base: str) -> None:
    async with open_provider(vendor.url + base) as provider:
        assert (await deltas(provider, job(stream=False)))[-1].finish_reason
    assert (await vendor.received()).path == "/v1/chat/completions"


@pytest.mark.parametrize("key", [None, "", "  "])
async def test_without_a_key_it_is_not_configured(vendor: FaultUpstream, key: str | None) -> None:
    async with open_provider(vendor.openai_base_url, key=key) as provider:
        assert not provider.configured
    async with open_provider(vendor.openai_base_url) as provider:
        assert provider.configured


@pytest.mark.parametrize("key", ["sk\r\nX-Evil: 1", "sk\x00"])
async def test_a_key_that_is_not_a_valid_header_fails_and_is_not_shown(
    vendor: FaultUpstream, key: str
) -> None:
    async with open_provider(vendor.openai_base_url, key=key) as provider:
        error, _ = await failure(provider, job(stream=False))
    assert isinstance(error, PomeloError)
    assert error.code == "provider_failed"
    assert vendor.requests == []
