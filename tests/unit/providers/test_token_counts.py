"""Counts of tokens that a vendor reports: which are credible, and what is made of the others."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.text import credible, token_usage


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (7, 7),
        (7.0, 7),
        (10**9, 10**9),
        (10**9 + 1, None),
        (-1, None),
        (1.5, None),
        (float("nan"), None),
        (True, None),
        ("7", None),
        (None, None),
    ],
)
def test_only_a_possible_whole_number_is_a_count(value: Any, expected: int | None) -> None:
    assert credible(value) == expected


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (9, 7, Usage(input_tokens=9, output_tokens=7)),
        (0, 0, Usage()),
        (9, None, Usage(input_tokens=9)),
        (None, 7, Usage(output_tokens=7)),
        (0, None, None),
        (None, 0, None),
        ("9", 0, None),
        (None, None, None),
    ],
)
def test_one_of_two_counts_is_enough_unless_it_is_zero(
    prompt: Any, completion: Any, expected: Usage | None
) -> None:
    assert token_usage(prompt, completion) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((6, 3, 3), (6, 3, 3)),
        ((6, 2, 1), (6, 2, 1)),
        ((9, None, None), (9, 0, 0)),
        ((None, 9, None), (0, 9, 0)),
        ((6, 4, 0), (0, 0, 0)),
        ((6, 2, 3), (0, 0, 0)),
        ((None, None, 1), (0, 0, 0)),
        ((6, -1, 0), (0, 0, 0)),
    ],
)
def test_parts_of_the_prompt_that_contradict_each_other_are_left_out(
    parts: tuple[Any, Any, Any], expected: tuple[int, int, int]
) -> None:
    cached, written, written_1h = parts
    usage = token_usage(9, 7, cached=cached, written=written, written_1h=written_1h)
    assert usage is not None
    assert usage.input_tokens == 9
    counts = usage.cached_input_tokens, usage.cache_write_input_tokens, usage.cache_write_1h_input_tokens
    assert counts == expected


@pytest.mark.parametrize(("reasoning", "expected"), [(7, 7), (8, 0), (0, 0), (-1, 0), (None, 0)])
def test_all_of_the_output_may_be_reasoning(reasoning: Any, expected: int) -> None:
    usage = token_usage(9, 7, reasoning=reasoning)
    assert usage is not None
    assert usage.reasoning_tokens == expected
