"""Text answers: words, token counts and finish reasons."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

import pytest

from pomelo.catalog.catalog import Limits
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.text_pb2 import ContentPart, FinishReason, ImagePart, Message, Role, TextInput
from pomelo.providers.sandbox import Sandbox
from tests.unit.loop import watched
from tests.unit.providers.sandbox.sandbox_jobs import CATALOG, ask, job, message, user_input

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH
PROMPT = "Explain quantum computing in simple terms."


async def test_a_stream_has_one_word_per_delta_and_the_usage_last(sandbox: Sandbox) -> None:
    *words, last = await ask(sandbox, user_input(PROMPT))
    assert all(word.content and word.content.count(" ") <= 1 and not word.finish_reason for word in words)
    assert [word.content[0] == " " for word in words] == [False] + [True] * (len(words) - 1)
    assert last.finish_reason == STOP
    assert (last.usage.input_tokens, last.usage.output_tokens) == (6, len(words))
    assert 20 <= len(words) <= 60


@pytest.mark.parametrize(
    "given", [{}, {"max_tokens": 7}, {"stop": ["said"]}, {"max_tokens": 1}, {"seed": 3}, {"stop": ["This"]}]
)
async def test_the_unary_answer_equals_the_joined_stream(sandbox: Sandbox, given: dict[str, object]) -> None:
    streamed = await ask(sandbox, user_input(PROMPT, **given))
    (answer,) = await ask(sandbox, user_input(PROMPT, **given), stream=False)
    assert answer.content == "".join(delta.content for delta in streamed)
    assert answer.usage == streamed[-1].usage
    assert answer.finish_reason == streamed[-1].finish_reason
    assert answer.usage.output_tokens == len(answer.content.split())


async def test_an_answer_names_the_sandbox_and_the_model_and_echoes_the_prompt(sandbox: Sandbox) -> None:
    (answer,) = await ask(sandbox, user_input(PROMPT), "claude-3-opus", stream=False)
    assert "sandbox" in answer.content
    assert "claude-3-opus" in answer.content
    assert PROMPT in answer.content


async def test_equal_inputs_have_equal_answers_and_different_inputs_different_answers(
    sandbox: Sandbox,
) -> None:
    async def content(prompt: str, model: str = "gpt-4", **given: object) -> str:
        (answer,) = await ask(Sandbox(), user_input(prompt, **given), model, stream=False)
        return str(answer.content)

    assert await content(PROMPT) == await content(PROMPT)
    tails = {(await content(PROMPT, seed=seed)).split('" ')[1] for seed in range(20)}
    assert len(tails) > 10
    assert await content("a") != await content("b")
    assert await content("a", "gpt-4-turbo") != await content("a")


async def test_the_last_message_of_a_user_is_answered(sandbox: Sandbox) -> None:
    given = TextInput(
        messages=[
            message(Role.ROLE_SYSTEM, "Be brief."),
            message(Role.ROLE_USER, "first question"),
            message(Role.ROLE_ASSISTANT, "an answer"),
            message(Role.ROLE_USER, "second question"),
            message(Role.ROLE_ASSISTANT, "So:"),
        ]
    )
    (answer,) = await ask(sandbox, given, stream=False)
    assert '"second question"' in answer.content
    assert answer.usage.input_tokens == 2 + 2 + 2 + 2 + 1


async def test_an_image_counts_as_85_tokens(sandbox: Sandbox) -> None:
    image = ImagePart(source=MediaSource(url="data:image/png;base64,AAAA"))
    parts = [ContentPart(text="what is"), ContentPart(image=image), ContentPart(text="this")]
    given = TextInput(messages=[Message(role=Role.ROLE_USER, content=parts)])
    (answer,) = await ask(sandbox, given, stream=False)
    assert answer.usage.input_tokens == 85 + 3
    assert '"what is this"' in answer.content


@pytest.mark.parametrize("max_tokens", [1, 5, 40])
async def test_max_tokens_is_honoured_exactly(sandbox: Sandbox, max_tokens: int) -> None:
    (answer,) = await ask(sandbox, user_input("[[words:41]]", max_tokens=max_tokens), stream=False)
    assert (len(answer.content.split()), answer.finish_reason) == (max_tokens, LENGTH)
    assert answer.usage.output_tokens == max_tokens


@pytest.mark.parametrize("max_tokens", [41, 42, 100_000])
async def test_an_answer_shorter_than_max_tokens_finishes_with_stop(
    sandbox: Sandbox, max_tokens: int
) -> None:
    (answer,) = await ask(sandbox, user_input("[[words:41]]", max_tokens=max_tokens), stream=False)
    assert (len(answer.content.split()), answer.finish_reason) == (41, STOP)


async def test_an_answer_ends_at_the_models_output_limit(sandbox: Sandbox) -> None:
    model = replace(CATALOG.by_any_name["gpt-4"], limits=Limits(max_input_tokens=1000, max_output_tokens=50))
    (answer,) = await ask(sandbox, user_input("[[words:999999999]]", max_tokens=5000), model, stream=False)
    assert (answer.usage.output_tokens, answer.finish_reason) == (50, LENGTH)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["answering"], "This is the Pomelo sandbox,"),
        (["nowhere", "box", "answering"], "This is the Pomelo sand"),
        (["This is"], ""),
        ([" is the"], "This"),
    ],
)
async def test_an_answer_ends_before_a_stop_string(sandbox: Sandbox, stop: list[str], expected: str) -> None:
    *words, last = await ask(sandbox, user_input(PROMPT, stop=stop))
    assert "".join(word.content for word in words) == expected
    assert last.finish_reason == STOP
    assert last.usage.output_tokens == len(expected.split())


async def test_a_stop_string_has_an_effect_within_max_tokens_only(sandbox: Sandbox) -> None:
    (answer,) = await ask(sandbox, user_input(PROMPT, stop=["answering"], max_tokens=3), stream=False)
    assert (answer.content, answer.finish_reason) == ("This is the", LENGTH)
    (answer,) = await ask(sandbox, user_input(PROMPT, stop=["the"], max_tokens=3), stream=False)
    assert (answer.content, answer.finish_reason) == ("This is", STOP)


async def test_a_prompt_above_the_models_input_limit_is_refused(sandbox: Sandbox) -> None:
    model = replace(CATALOG.by_any_name["gpt-4"], limits=Limits(max_input_tokens=10, max_output_tokens=50))
    assert await ask(sandbox, user_input("word " * 10), model)
    with pytest.raises(PomeloError) as refused:
        await ask(sandbox, user_input("word " * 11), model)
    assert (refused.value.code, refused.value.field) == ("context_length_exceeded", "messages")
    assert "11" in refused.value.message


async def test_a_trigger_sets_the_length_of_the_answer(sandbox: Sandbox) -> None:
    *words, last = await ask(sandbox, user_input("[[words:5000]] Tell me everything."))
    assert len(words) == last.usage.output_tokens == 5000
    text = "".join(word.content for word in words)
    assert "Tell me everything." in text


async def test_a_prompt_without_text_is_answered(sandbox: Sandbox) -> None:
    given = TextInput(messages=[message(Role.ROLE_SYSTEM, "x")])
    (answer,) = await ask(sandbox, given, stream=False)
    assert answer.finish_reason == STOP
    assert answer.content


async def test_other_asyncio_tasks_run_between_the_words(sandbox: Sandbox) -> None:
    async with watched() as turns:
        words = await ask(sandbox, user_input("[[words:200]]"))
    assert len(turns) >= len(words) - 2


async def test_a_stream_can_be_closed_after_any_word(sandbox: Sandbox) -> None:
    async with aclosing(sandbox.text(job("gpt-4", user_input("[[words:128000]]")))) as events:
        assert (await anext(events)).text_delta.text == "This"
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_the_sandbox_is_always_configured_and_can_be_closed_twice(sandbox: Sandbox) -> None:
    assert sandbox.configured
    await sandbox.aclose()
    await sandbox.aclose()
