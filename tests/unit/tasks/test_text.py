"""Texts: words, bounds and token counts, and what a stream keeps of its text."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.catalog.reported_cost import Report
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FINISH_REASON_STOP
from pomelo.gen.v1.usage_pb2 import Usage as UsageCounts
from pomelo.tasks import text
from pomelo.tasks.base import AudioInfo, Estimate
from tests.unit.refusals import refused
from tests.unit.tasks.collectors import (
    MODELS,
    PIXEL,
    collector,
    delta,
    estimate_of,
    finish,
    no_files,
    task_input,
    text_end,
    text_of,
)

BLANKS = " \t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"

contents = st.text(st.one_of(st.sampled_from(BLANKS), st.characters(exclude_categories=["Cs"])), max_size=60)


def conversation(*contents: Any) -> dict[str, Any]:
    """A field of the REST body: the messages of a user."""
    return {"messages": [{"role": "user", "content": content} for content in contents]}


@settings(deadline=None)
@example([f"a{chr(code)}b" for code in range(256)], 2)
@given(st.lists(contents, min_size=1, max_size=3), st.integers(1, 7))
def test_words_are_counted_equally_in_one_text_and_in_slices(messages: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pomelo.providers.text.words.SLICE", size)
        tokens = estimate_of("gpt-4", task_input("gpt-4", **conversation(*messages))).count_input()
    words = sum(len(content.split()) for content in messages)
    assert tokens == max(words, sum(len(content.encode()) for content in messages) // 8)


def test_partial_usage_does_not_count_a_long_prompt_again() -> None:
    given = task_input("gpt-4", **conversation("word " * 500_000))
    collected = collector("gpt-4", stream=True, given=given)
    for piece in ("five ", "more."):
        collected.add(delta(piece))
    collected.partial_usage(given)
    tracemalloc.start()
    try:
        used = collected.partial_usage(given)
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()
    assert (used.input_tokens, used.output_tokens) == (500_000, 2)


@pytest.mark.parametrize("counted", [False, True], ids=["not counted before", "counted"])
@pytest.mark.parametrize("content", ["word " * 100_000, "größe\u2003" * 50_000], ids=["latin", "other"])
def test_a_long_whole_answer_without_usage_is_counted_exactly_in_little_memory(
    content: str, counted: bool
) -> None:
    words = len(content.split())
    unlimited = Usage(input_tokens=10**9, output_tokens=10**9)
    collected = collector("gpt-4", estimate=Estimate(unlimited, unlimited))
    collected.add(text_end(content))
    finish(collected)
    assert collected.must_count
    tracemalloc.start()
    try:
        if counted:
            collected.count()
        used, is_exact = collected.usage(None)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert used.output_tokens == max(words, len(content.encode()) // 8)
    assert not is_exact


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 16_383, 16_384, 2_097_151, 2_097_152])
def test_a_text_of_any_length_is_estimated_by_its_bytes(size: int) -> None:
    for content in ("x" * size, ("ö" * (size // 2)).rjust(size - size // 2, "x")):
        found = estimate_of("gpt-4", task_input("gpt-4", **conversation(content), max_tokens=1))
        assert found.tokens == size // 4 + 1
        assert found.count_input() == max(size // 8, bool(size))


@pytest.mark.parametrize("last", [98, 99])
def test_the_number_of_parts_of_all_messages_is_limited(last: int) -> None:
    part = {"type": "text", "text": "a"}
    given = task_input("gpt-4", **conversation(*[[part] * 100] * 99, [part] * last, [part] * 2))
    if last == 98:
        text.check(given, MODELS["gpt-4"], no_files)
    else:
        with refused("invalid_parameter", "messages", match="10,000 parts"):
            text.check(given, MODELS["gpt-4"], no_files)


def test_messages_of_one_text_do_not_count_as_parts() -> None:
    part = {"type": "text", "text": "a"}
    given = task_input("gpt-4", **conversation(*[[part] * 100] * 100, *["a"] * 9_900))
    text.check(given, MODELS["gpt-4"], no_files)
    text.check(task_input("gpt-4", **conversation(*["a"] * 10_000)), MODELS["gpt-4"], no_files)


@pytest.mark.parametrize("keep", [False, True])
def test_the_text_of_a_stream_is_kept_only_for_an_idempotency_key(keep: bool) -> None:
    collected = collector("gpt-4", stream=True, keep=keep)
    tracemalloc.start()
    try:
        for _ in range(100_000):
            event = delta("four")
            assert collected.add(event) is event
        memory = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    collected.add(text_end())
    assert text_of(finish(collected)) == ("four" * 100_000 if keep else "")
    # A stored text takes about its own bytes, not those of 100,000 pieces.
    assert memory < (1_000_000 if keep else 20_000)
    assert collected.usage(None)[0].output_tokens == 100_000


def test_a_stored_stream_has_its_complete_text() -> None:
    collected = collector("gpt-4", stream=True, keep=True)
    for piece in ("one", " two"):
        assert collected.add(delta(piece)) is not None
    collected.add(text_end(" three"))
    assert text_of(finish(collected)) == "one two three"


# --- token counts


@pytest.mark.parametrize(
    ("counts", "counted"),
    [
        ((1, 1), True),
        ((922_000, 128_000), True),
        ((9, 5, 4, 5), True),
        ((9, 5, 0, 5, 5), True),
        ((0, 1), False),
        ((1, 0), False),
        ((922_001, 1), False),
        ((1, 128_001), False),
        ((9, 5, 5, 5), False),
        ((9, 5, -1), False),
        ((9, 5, 0, -1), False),
        ((9, 5, 0, 4, 5), False),
        ((9, 5, 0, 0, -1), False),
    ],
)
def test_plausible_counts_of_a_provider_are_used_and_others_logged(
    counts: tuple[int, ...], counted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("input", "output", "cached_input", "cache_write_input", "cache_write_1h_input")
    collected = collector("gpt-4", stream=True)
    collected.add(delta("some words"))
    usage = {f"{name}_tokens": count for name, count in zip(names, counts, strict=False)}
    collected.add(text_end(**usage))
    collected.finish(TaskResult())
    used, by_provider = collected.usage(None)
    assert by_provider == counted == (not caplog.records)
    if counted:
        assert used == Usage(**usage)
    assert used.input_tokens >= 1
    assert used.output_tokens >= 1


def test_an_early_count_of_the_input_is_billed() -> None:
    report = Report()
    collected = collector("gpt-4", stream=True, report=report)
    report.usage = UsageCounts(input_tokens=77)
    assert collected.add(delta("some words")) == delta("some words")
    collected.add(text_end())
    collected.finish(TaskResult())
    assert collected.usage(None)[0].input_tokens == 77


@pytest.mark.parametrize(
    "pieces",
    [("four words are here",), ("four ", "words ", "are ", "here"), ("", "four words", "", " are here")],
)
def test_a_unary_answer_without_reported_usage_is_not_free(pieces: tuple[str, ...]) -> None:
    collected = collector("gpt-4")
    for piece in pieces[:-1]:
        collected.add(delta(piece))
    collected.add(text_end(pieces[-1]))
    result = finish(collected)
    used, counted = collected.usage(None)
    assert not counted
    assert used.input_tokens == 3
    assert 2 <= used.output_tokens <= 4
    assert text_of(result) == "four words are here"


def test_deltas_without_text_are_not_counted_as_tokens() -> None:
    collected = collector("gpt-4", stream=True)
    for piece in ("", "one", "", " two", ""):
        collected.add(delta(piece))
    collected.add(text_end())
    collected.finish(TaskResult())
    assert collected.usage(None)[0].output_tokens == 2


def test_only_the_input_of_an_early_count_is_billed() -> None:
    report = Report()
    report.usage = UsageCounts(input_tokens=77, output_tokens=9, reasoning_tokens=4)
    collected = collector("gpt-4", stream=True, report=report)
    assert collected.add(delta()) is None
    assert collected.partial_usage(None) == Usage(input_tokens=77)


@pytest.mark.parametrize(
    ("counts", "billed", "counted"),
    [
        ((77, 0), (77, 1), False),  # an impossible count of the output
        ((0, 50), (3, 50), False),  # of the input
        ((77, 50), (77, 50), True),
    ],
)
def test_a_plausible_count_is_used_beside_an_impossible_one(
    counts: tuple[int, int], billed: tuple[int, int], counted: bool
) -> None:
    collected = collector("gpt-4")
    collected.add(text_end("Yes", input_tokens=counts[0], output_tokens=counts[1]))
    result = finish(collected)
    assert collected.usage(None) == (Usage(*billed), counted)
    assert result.text.finish_reason == FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("counts", "billed"),
    [
        ((9, 5, 0), Usage(9, 5)),
        ((9, 5, 5), Usage(9, 5, reasoning_tokens=5)),
        ((9, 5, 6), Usage(9, 5)),
        ((9, 5, -1), Usage(9, 5)),
        ((0, 5, 4), Usage(3, 5, reasoning_tokens=4)),  # the input is estimated
        ((9, 128_001, 4), Usage(9, 1)),  # the output is
        ((0, 128_001, 4), Usage(3, 1)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_a_part_of_the_output_that_was_counted(
    counts: tuple[int, int, int], billed: Usage, stream: bool
) -> None:
    collected = collector("gpt-4", stream=stream)
    collected.add(delta("Yes"))
    collected.add(text_end(input_tokens=counts[0], output_tokens=counts[1], reasoning_tokens=counts[2]))
    finish(collected)
    assert collected.usage(None)[0] == billed


def test_an_answer_without_text_may_have_no_tokens() -> None:
    collected = collector("gpt-4")
    collected.add(text_end(input_tokens=5))
    finish(collected)
    assert collected.usage(None) == (Usage(5, 0), True)


# --- bounds


@pytest.mark.parametrize(
    ("max_tokens", "affordable", "sent"),
    [(None, 128_000, None), (None, 127_999, 127_999), (50, 50, 50), (50, 10**6, 50), (50, 49, 49)],
)
def test_the_output_is_limited_to_what_is_paid_for(
    max_tokens: int | None, affordable: int, sent: int | None
) -> None:
    given = task_input("gpt-4", **({"max_tokens": max_tokens} if max_tokens else {}))
    assert text.limit_output(given, estimate_of("gpt-4", given), affordable) == sent


def partial_usage(estimate: Estimate, sizes: list[int]) -> Usage:
    """The usage of a stream that ends early, after pieces of these sizes."""
    collected = collector("gpt-4", stream=True, estimate=estimate)
    for size in sizes:
        collected.add(delta("x" * size))
    return collected.partial_usage(None)


def test_the_bound_of_a_text_counts_its_bytes_its_messages_and_its_images() -> None:
    parts = [{"type": "text", "text": "four"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    messages = [{"role": "system", "content": "größe"}, {"role": "user", "content": parts}]

    def estimated(max_tokens: int | None = None, **limits: int) -> Estimate:
        given = task_input("gpt-4", messages=messages, **({"max_tokens": max_tokens} if max_tokens else {}))
        model: Model = replace(MODELS["gpt-4"], limits=replace(MODELS["gpt-4"].limits, **limits))
        return text.estimate(given, model, Route("p", "m"), AudioInfo())

    size = 7 + 4
    tokens = size + 16 * 3 + 6_000
    found = estimated(50)
    assert (found.minimum, found.maximum, found.sufficient) == (Usage(tokens, 50), Usage(tokens, 50), None)
    assert (found.tokens, found.count_input()) == (size // 4 + 50, 2 + 1_100)
    found = estimated()
    assert (found.minimum, found.maximum) == (Usage(tokens, 1), Usage(tokens, 128_000))
    assert found.sufficient == Usage(tokens, 1_024)
    assert found.tokens == size // 4
    found = estimated(500, max_output_tokens=100, max_input_tokens=1_000)
    assert found.maximum == Usage(1_000, 100)
    found = estimated(max_output_tokens=100)
    assert found.sufficient == Usage(tokens, 100)
    assert partial_usage(estimated(max_input_tokens=1_000), [200, 300, 300]) == Usage(1_000, 100)
    assert partial_usage(found, [1] * 101).output_tokens == 100


def test_more_input_than_the_catalogue_allows_is_billed_as_far_as_a_text_can_have_it() -> None:
    model = replace(MODELS["gpt-4"], limits=Limits(max_input_tokens=1_000, max_output_tokens=100))
    given = task_input("gpt-4", messages=[{"role": "user", "content": "\u5b57" * 1_200}])
    text.check(given, model, no_files)
    bound = text.estimate(given, model, Route("p", "m"), AudioInfo())
    assert bound.maximum.input_tokens == 1_000
    possible = 3_600 + 16 * 2
    for count, billed in ((1_200, 1_200), (possible, possible), (possible + 1, 450)):
        collected = collector("gpt-4", estimate=bound, given=given, served=model)
        collected.add(text_end("ok", input_tokens=count, output_tokens=2))
        finish(collected)
        assert collected.usage(None) == (Usage(billed, 2), billed == count)


@pytest.mark.parametrize("stream", [False, True])
def test_the_size_of_a_text_is_in_bytes(stream: bool) -> None:
    collected = collector("gpt-4", stream=stream)
    collected.add(delta("größe"))
    assert collected.output_bytes == 7


def test_an_empty_text_is_a_message_with_an_empty_part() -> None:
    collected = collector("gpt-4")
    collected.add(text_end())
    (part,) = finish(collected).text.message.content
    assert part.HasField("text")
    assert part.text == ""
