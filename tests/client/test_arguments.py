"""Wrong arguments are refused before a call is made, with a ValueError or a TypeError that says what is wrong."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from pomelo.client import Client, DeadlineExceeded, Media, Tool, user
from tests.client.conftest import ClientFactory
from tests.conftest import Keys

WRONG_TASKS: list[tuple[dict[str, Any], str]] = [
    ({"timeout": "5"}, "timeout must be a number of seconds, not '5'"),
    ({"timeout": math.nan}, "timeout must be a number of seconds, not nan"),
    ({"retries": "2"}, "retries must be a whole number, not '2'"),
    ({"retries": -1}, "retries must be 0 or more, not -1"),
    ({"request_id": "a\nb"}, "request_id must be printable ASCII"),
    ({"request_id": 5}, "request_id must be text, not int"),
    ({"idempotency_key": "é"}, "idempotency_key must be printable ASCII"),
    ({"idempotency_key": b"x"}, "idempotency_key must be text, not bytes"),
    ({"idempotency_key": 0}, "idempotency_key must be text, not int"),
    ({"tools": [{"type": "function"}]}, "tools must be a list of Tool, not of dict"),
    ({"reasoning_effort": "some"}, "reasoning_effort must be one of none, minimal, .*, not 'some'"),
    ({"reasoning_effort": 5}, "reasoning_effort must be one of"),
    ({"max_tokens": "5"}, "max_tokens can't be '5': "),
    ({"seed": 2**63}, "seed can't be 9223372036854775808: "),
    ({"temperature": "x" * 200}, "temperature can't be 'x{99}: "),
    ({"stop": [5]}, r"stop can't be \[5\]: "),
    ({"metadata": {"team": 5}}, "metadata must have texts, not 'team': 5"),
    ({"tools": Tool("weather")}, "tools must be a list of Tool, not Tool"),
    ({"tools": {"type": "function"}}, "tools must be a list of Tool, not dict"),
    ({"tool_choice": "maybe"}, "tool_choice must be auto, none, required or a Tool, not 'maybe'"),
    ({"format": "xml"}, "format must be text, json or a JsonSchema, not 'xml'"),
    ({"response_format": {}}, "^There is no argument 'response_format'. Use format for text, "),
    ({"stream": True}, "^There is no argument 'stream'. Use a method whose name begins "),
    ({"maxTokens": 3}, "^There is no argument 'maxTokens'$"),
]

WRONG_MESSAGES: list[tuple[Any, str]] = [
    ([{"role": "user"}], "content of a dict is a text, not NoneType"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "content of a dict is a text, not list",
    ),
    ([{"content": "Hi"}], "role of a dict is .*, not None"),
    ([{"role": "tool", "content": "Hi"}], "role of a dict is .*, not 'tool'"),
    ([{"role": "user", "content": "Hi", "name": "Ann"}], "not 'name'"),
    ({"role": "user", "content": "Hi"}, "messages must be a text or a list of messages, not dict"),
    (b"Hi", "messages must be a text or a list of messages, not bytes"),
    (user("Hi"), "messages must be a text or a list of messages, not Message"),
    ([None], "A message is a dict .*, not NoneType"),
    (None, "messages must be a text or a list of messages, not NoneType"),
]

MAKE: Any = user

WRONG_CALLS: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda client: client.image("flux-1-pro", "Hi", output_format="gif"),
        "output_format must be one of png, jpeg",
    ),
    (
        lambda client: client.transcribe("m", b"x", timestamps="line"),
        "timestamps must be one of none, word, ch",
    ),
    (lambda client: client.image("m", "Hi", width="64"), "width can't be '64': "),
    (lambda client: client.image("m", "Hi", delivery="post"), "delivery must be bytes, link or both"),
    (
        lambda client: client.speech("m", "Hi", voice="adam", voice_settings={"pitch": 1}),
        "voice_settings has no 'pitch'. It has stability, ",
    ),
    (
        lambda client: client.convert_speech("m", b"x", voice="adam", voice_settings={"speed": "1"}),
        "speed can't be '1': ",
    ),
    (lambda client: client.transcribe("m", bytearray(9)), "not of the type bytearray"),
    (lambda client: client.upload(io.StringIO("audio")), "not of the type StringIO"),
    (lambda client: client.upload(Media(id="media_x")), "not of the type Media"),
    (lambda client: client.download(None, "x.png"), r"result\.media, or its id, not NoneType"),
    (lambda client: client.download("media_x", 5), "open for writing bytes, not of the type int"),
    (lambda client: list(client.usage(start=date(2026, 1, 1))), r"datetime\.datetime, not date"),
    (lambda client: list(client.usage(start=datetime(2026, 1, 1))), "need a time zone"),  # noqa: DTZ001
    (lambda client: list(client.usage(begin=None)), "begin"),
    (
        lambda client: list(client.usage_sums("week")),
        "group_by must be one of model, key, day, .*, not 'week'",
    ),
    (lambda client: list(client.usage_sums(5)), "group_by must be one of"),
    (lambda _: user("Hi", images="kite.png"), "images must be a list of images"),
    (lambda _: MAKE("Hi", images=Path("kite.png")), "images must be a list of images, not PosixPath"),
    (lambda _: MAKE("Hi", images=Media(id="media_x")), "images must be a list of images, not Media"),
    (lambda _: MAKE("Hi", detail="some"), "detail must be one of auto, low, high"),
]

WRONG_CLIENTS: list[tuple[dict[str, Any], str]] = [
    ({"target": 5}, "target must be text, not int"),
    ({"target": "http://me:secret-word@127.0.0.1:1"}, "no user and no password"),
    ({"target": "https://pomelo.example?a=b"}, "no target"),
    ({"key": b"pml_test_x"}, "key must be text, not bytes"),
    ({"certificate": "client.pem"}, "pair of files"),
    ({"timeout": None}, "timeout must be a number of seconds, not None"),
    ({"retries": None}, "retries must be a whole number, not None"),
]


@pytest.fixture
def nowhere() -> Client:
    """A client that must not make a call."""
    return Client("127.0.0.1:1", key="pml_test_x", retries=0)


@pytest.mark.parametrize(("options", "message"), WRONG_TASKS)
async def test_a_wrong_argument_of_a_task_is_named_by_both_clients(
    connect: ClientFactory, options: dict[str, Any], message: str
) -> None:
    client = connect("pml_test_x", "127.0.0.1:1")
    with pytest.raises((ValueError, TypeError), match=message):
        await client.text("gpt-4", "Hi", **options)
    with pytest.raises((ValueError, TypeError), match=message):
        async with client.stream("gpt-4", "Hi", **options):
            pytest.fail("the stream has begun")


@pytest.mark.parametrize(("messages", "message"), WRONG_MESSAGES)
def test_a_wrong_message_is_refused(nowhere: Client, messages: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        nowhere.text("gpt-4", messages)


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS)
def test_a_wrong_argument_of_a_method_is_named(
    nowhere: Client, call: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(nowhere)


@pytest.mark.parametrize(("options", "message"), WRONG_CLIENTS)
def test_a_wrong_argument_of_a_client_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        Client(**({"key": "pml_test_x"} | options))
    assert "secret-word" not in str(caught.value)


async def test_a_timeout_without_end_is_none_and_one_that_has_passed_ends_the_call(
    connect: ClientFactory, keys: Keys
) -> None:
    client = connect(keys.test, timeout=math.inf)
    assert (await client.text("gpt-4", "Hi")).text
    assert (await client.text("gpt-4", "Hi", timeout=1e15)).text
    with pytest.raises(DeadlineExceeded):
        await client.text("gpt-4", "Hi", timeout=-1)


async def test_a_tool_is_one_tool_of_a_list(client: Any) -> None:
    assert (await client.text("gpt-4", "Hi", tools=[Tool("weather")])).finish_reason
