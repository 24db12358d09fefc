"""The page of faults is generated from the table of faults."""

from __future__ import annotations

from tests.faults.page import PATH, page


def test_the_page_of_faults_equals_the_table() -> None:
    assert PATH.read_text() == page(), "run: python -m tests.faults.page"
