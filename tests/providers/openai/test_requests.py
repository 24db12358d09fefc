"""Requests of the OpenAI provider: every field of the contract, and no value that the vendor would refuse."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest

from pomelo.catalog.catalog import Route
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from pomelo.testing import FaultUpstream
from tests.providers.rig import KEY
from tests.providers.text_rig import OPENAI, PNG, USER, hi, image, largest_input, message, sent

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
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "A dot."}, {"type": "text", "text": " Or two."}],
    },
    {
        "role": "system",
        "content": [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be quick."}],
    },
    {"role": "user", "content": "Sure?"},
]


async def test_the_largest_request_is_exactly_this(upstream: FaultUpstream) -> None:
    received = await sent(OPENAI, upstream, largest_input(), user=USER, stream=True)
    assert received.body == {
        "model": "gpt-4.1",
        "messages": MESSAGES,
        "max_tokens": 100,
        "temperature": 1.75,
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


async def test_whole_numbers_stay_whole_in_the_request(upstream: FaultUpstream) -> None:
    received = await sent(OPENAI, upstream, largest_input(), user=USER)
    assert b'"max_tokens":100,' in received.raw
    assert b'"seed":9007199254740991,' in received.raw


async def test_the_smallest_request_has_no_field_that_the_caller_did_not_set(upstream: FaultUpstream) -> None:
    received = await sent(OPENAI, upstream, hi())
    assert received.body == {"model": "gpt-4.1", "messages": [{"role": "user", "content": "Hi"}]}


async def test_a_zero_that_the_caller_set_is_sent(upstream: FaultUpstream) -> None:
    text_input = hi(temperature=0, seed=0)
    body = (await sent(OPENAI, upstream, text_input)).body
    assert (body["temperature"], body["seed"]) == (0, 0)


async def test_a_route_drops_clamps_and_renames(upstream: FaultUpstream) -> None:
    route = Route(
        "openai",
        "gpt-5.6-sol",
        drop=frozenset(("stop", "presence_penalty", "frequency_penalty", "user", "seed")),
        clamp={"temperature": (0, 0.5, 0), "max_tokens": (16, 64, 0)},
        options={"max_tokens_field": "max_completion_tokens", "reasoning_effort": "none"},
    )
    assert (await sent(OPENAI, upstream, largest_input(), user=USER, route=route)).body == {
        "model": "gpt-5.6-sol",
        "messages": MESSAGES,
        "max_completion_tokens": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "reasoning_effort": "none",
    }


async def test_max_tokens_above_the_models_limit_become_the_limit(upstream: FaultUpstream) -> None:
    assert (await sent(replace(OPENAI, max_output_tokens=50), upstream, largest_input(), user=USER)).body[
        "max_tokens"
    ] == 50


async def test_only_our_own_headers_are_sent(upstream: FaultUpstream) -> None:
    received = await sent(OPENAI, upstream, largest_input(), user=USER, stream=True)
    assert received.headers["Authorization"] == f"Bearer {KEY}"
    assert received.headers["Content-Type"] == "application/json"
    assert received.headers["Accept-Encoding"] == "identity"
    assert {name.lower() for name in received.headers} == {
        "accept", "accept-encoding", "authorization", "content-length", "content-type", "host", "user-agent",
    }  # fmt: skip


@pytest.mark.parametrize("length", [1, 64])
async def test_an_end_user_id_that_fits_is_sent_unchanged(upstream: FaultUpstream, length: int) -> None:
    user = "ü" * length
    assert (await sent(OPENAI, upstream, hi(), user=user)).body["safety_identifier"] == "ü" * length


async def test_an_end_user_id_that_is_too_long_is_sent_as_a_digest(upstream: FaultUpstream) -> None:
    user = "ü" * 65
    body = (await sent(OPENAI, upstream, hi(), user=user)).body
    assert body["safety_identifier"] == sha256(("ü" * 65).encode()).hexdigest()
    assert len(body["safety_identifier"]) == 64
    assert "user" not in body


async def test_an_empty_part_of_a_message_is_sent_as_a_text(upstream: FaultUpstream) -> None:
    received = await sent(OPENAI, upstream, TextInput(messages=[message(Role.ROLE_USER, "", "Hi")]))
    assert received.body["messages"][0]["content"] == [
        {"type": "text", "text": ""},
        {"type": "text", "text": "Hi"},
    ]


@pytest.mark.filterwarnings("error::ResourceWarning")
async def test_a_request_of_several_mebibytes_is_sent_completely(upstream: FaultUpstream) -> None:
    data_uri = "data:image/png;base64," + "A" * 3_000_000
    question = Message(role=Role.ROLE_USER, content=[image(data_uri)])
    received = await sent(OPENAI, upstream, TextInput(messages=[question]))
    assert received.body["messages"][0]["content"][0]["image_url"]["url"] == data_uri
