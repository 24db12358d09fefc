"""The arithmetic of the benchmark: percentiles, paired ratios, and the table."""

from __future__ import annotations

import pytest

from bench.results import HEAD, Sample, median, percentile, ratio, scenario_table, table


def sample(cpu: float = 1.0, *, count: int = 1000, p50: float = 0.001, failed: int = 0) -> Sample:
    """Returns a sample of two seconds."""
    return Sample(count, 2.0, p50, 0.01, cpu, 50_000_000, failed=failed)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([4.0, 1.0, 2.0, 3.0], 0.5, 2.0),
        ([float(value) for value in range(1, 101)], 0.99, 99.0),
        ([float(value) for value in range(1, 102)], 0.99, 100.0),
        ([7.0], 0.99, 7.0),
        ([7.0, 8.0], 0.0, 7.0),
    ],
)
def test_a_percentile_is_the_smallest_value_that_enough_values_do_not_exceed(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


def test_a_sample_knows_its_rate_and_what_a_request_costs() -> None:
    assert sample(0.5).rate == 500
    assert sample(0.5).cost == 0.0005


def test_a_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_the_medians() -> None:
    floor = [sample(cpu) for cpu in (1.0, 10.0, 2.0)]
    own = [sample(cpu) for cpu in (2.0, 15.0, 8.0)]
    assert ratio(own, floor, "cost") == 2.0
    assert median(own, "cpu") / median(floor, "cpu") == 4.0


def test_a_ratio_needs_the_same_rounds_of_both() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([sample(), sample()], [sample()], "cost")


def test_the_table_of_a_scenario_has_a_row_for_each_system_and_says_how_many_requests_failed() -> None:
    samples = {"floor": [sample(0.1)], "other": [sample(0.25, p50=0.003, failed=7)]}
    assert scenario_table("REST", samples) == (
        f"| REST | {' | '.join(HEAD[1:])} |\n"
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |\n"
        "| floor | 500 | 1.00 | 10.00 | 100 | 1 | 1 | 1 | 50 |\n"
        "| other (7 failed) | 500 | 3.00 | 10.00 | 250 | 2.50 | 3.00 | 1.00 | 50 |\n"
    )


def test_a_table_is_markdown() -> None:
    assert table(("a", "b"), [("c", "1")]) == "| a | b |\n| --- | --: |\n| c | 1 |\n"
