"""Replies: their words, tokens and ends."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from pomelo.catalog.catalog import Limits
from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import ContentPart, ContentParts, FinishReason, ImageUrl, Message, Role, TextInput
from pomelo.providers.sandbox import Sandbox
from tests.unit.providers.sandbox.sandbox_jobs import CATALOG, ask, job, say

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH
PROMPT = "Explain quantum computing in simple terms."


async def test_a_stream_gives_one_word_a_delta_and_the_usage_last(sandbox: Sandbox) -> None:
    *words, last = await ask(sandbox, say(PROMPT))
    assert all(word.content and word.content.count(" ") <= 1 and not word.finish_reason for word in words)
    assert [word.content[0] == " " for word in words] == [False] + [True] * (len(words) - 1)
    assert last.finish_reason == STOP
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, len(words))
    assert last.usage.total_tokens == 6 + len(words)
    assert 20 <= len(words) <= 60


@pytest.mark.parametrize(
    "given", [{}, {"max_tokens": 7}, {"stop": ["said"]}, {"max_tokens": 1}, {"seed": 3}, {"stop": ["This"]}]
)
async def test_the_whole_answer_is_the_stream_joined(sandbox: Sandbox, given: dict[str, object]) -> None:
    streamed = await ask(sandbox, say(PROMPT, **given))
    (whole,) = await ask(sandbox, say(PROMPT, **given), stream=False)
    assert whole.content == "".join(delta.content for delta in streamed)
    assert whole.usage == streamed[-1].usage
    assert whole.finish_reason == streamed[-1].finish_reason
    assert whole.usage.completion_tokens == len(whole.content.split())


async def test_an_answer_says_what_it_is_and_echoes_the_prompt(sandbox: Sandbox) -> None:
    (whole,) = await ask(sandbox, say(PROMPT), "claude-3-opus", stream=False)
    assert "sandbox" in whole.content
    assert "claude-3-opus" in whole.content
    assert PROMPT in whole.content


async def test_the_same_input_gives_the_same_answer_and_another_one_another(sandbox: Sandbox) -> None:
    async def content(prompt: str, model: str = "gpt-4", **given: object) -> str:
        (whole,) = await ask(Sandbox(), say(prompt, **given), model, stream=False)
        return str(whole.content)

    assert await content(PROMPT) == await content(PROMPT)
    tails = {(await content(PROMPT, seed=seed)).split('" ')[1] for seed in range(20)}
    assert len(tails) > 10
    assert await content("a") != await content("b")
    assert await content("a", "gpt-4-turbo") != await content("a")


async def test_the_last_message_of_a_user_is_answered(sandbox: Sandbox) -> None:
    given = TextInput(
        messages=[
            Message(role=Role.ROLE_SYSTEM, content="Be brief."),
            Message(role=Role.ROLE_USER, content="first question"),
            Message(role=Role.ROLE_ASSISTANT, content="an answer"),
            Message(role=Role.ROLE_USER, content="second question"),
            Message(role=Role.ROLE_ASSISTANT, content="So:"),
        ]
    )
    (whole,) = await ask(sandbox, given, stream=False)
    assert '"second question"' in whole.content
    assert whole.usage.prompt_tokens == 2 + 2 + 2 + 2 + 1


async def test_a_picture_counts_85_tokens(sandbox: Sandbox) -> None:
    parts = ContentParts(
        parts=[
            ContentPart(text="what is"),
            ContentPart(image_url=ImageUrl(url="data:image/png;base64,AAAA")),
            ContentPart(text="this"),
        ]
    )
    given = TextInput(messages=[Message(role=Role.ROLE_USER, parts=parts)])
    (whole,) = await ask(sandbox, given, stream=False)
    assert whole.usage.prompt_tokens == 85 + 3
    assert '"what is this"' in whole.content


@pytest.mark.parametrize("most", [1, 5, 40])
async def test_max_tokens_is_honoured_exactly(sandbox: Sandbox, most: int) -> None:
    (whole,) = await ask(sandbox, say("[[words:41]]", max_tokens=most), stream=False)
    assert (len(whole.content.split()), whole.finish_reason) == (most, LENGTH)
    assert whole.usage.completion_tokens == most


@pytest.mark.parametrize("most", [41, 42, 100_000])
async def test_an_answer_within_max_tokens_comes_to_its_own_end(sandbox: Sandbox, most: int) -> None:
    (whole,) = await ask(sandbox, say("[[words:41]]", max_tokens=most), stream=False)
    assert (len(whole.content.split()), whole.finish_reason) == (41, STOP)


async def test_the_models_own_limit_of_output_counts_too(sandbox: Sandbox) -> None:
    model = replace(CATALOG.resolve("gpt-4"), limits=Limits(max_input_tokens=1000, max_output_tokens=50))
    (whole,) = await ask(sandbox, say("[[words:999999999]]", max_tokens=5000), model, stream=False)
    assert (whole.usage.completion_tokens, whole.finish_reason) == (50, LENGTH)


@pytest.mark.parametrize(
    ("stop", "ends"),
    [
        (["answering"], "This is the Pomelo sandbox,"),
        (["nowhere", "box", "answering"], "This is the Pomelo sand"),
        (["This is"], ""),
        ([" is the"], "This"),
    ],
)
async def test_an_answer_ends_before_a_stop_string(sandbox: Sandbox, stop: list[str], ends: str) -> None:
    *words, last = await ask(sandbox, say(PROMPT, stop=stop))
    assert "".join(word.content for word in words) == ends
    assert last.finish_reason == STOP
    assert last.usage.completion_tokens == len(ends.split())


async def test_a_stop_string_beyond_max_tokens_is_not_met(sandbox: Sandbox) -> None:
    (whole,) = await ask(sandbox, say(PROMPT, stop=["answering"], max_tokens=3), stream=False)
    assert (whole.content, whole.finish_reason) == ("This is the", LENGTH)


async def test_a_prompt_of_more_tokens_than_the_model_takes_is_refused(sandbox: Sandbox) -> None:
    model = replace(CATALOG.resolve("gpt-4"), limits=Limits(max_input_tokens=10, max_output_tokens=50))
    assert await ask(sandbox, say("word " * 10), model)
    with pytest.raises(PomeloError) as refused:
        await ask(sandbox, say("word " * 11), model)
    assert (refused.value.code, refused.value.field) == ("context_length_exceeded", "messages")
    assert "11" in refused.value.message


async def test_a_long_answer_can_be_asked_for(sandbox: Sandbox) -> None:
    *words, last = await ask(sandbox, say("[[words:5000]] Tell me everything."))
    assert len(words) == last.usage.completion_tokens == 5000
    text = "".join(word.content for word in words)
    assert "Tell me everything." in text


async def test_a_prompt_without_text_is_answered(sandbox: Sandbox) -> None:
    given = TextInput(messages=[Message(role=Role.ROLE_SYSTEM, content="x")])
    (whole,) = await ask(sandbox, given, stream=False)
    assert whole.finish_reason == STOP
    assert whole.content


async def test_others_run_between_the_words(sandbox: Sandbox) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    words = await ask(sandbox, say("[[words:200]]"))
    counting.cancel()
    assert turns >= len(words) - 2


async def test_a_stream_can_be_left_at_any_word(sandbox: Sandbox) -> None:
    async with aclosing(sandbox.text(job("gpt-4", say("[[words:128000]]")))) as events:
        assert (await anext(events)).text_delta.content == "This"
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_it_is_always_configured_and_closes(sandbox: Sandbox) -> None:
    assert sandbox.configured
    await sandbox.aclose()
    await sandbox.aclose()
