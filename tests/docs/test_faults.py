"""The page of faults is the table of faults."""

from __future__ import annotations

from tests.faults.page import PATH, page


def test_the_page_of_faults_is_made_of_the_table() -> None:
    assert PATH.read_text() == page(), "write it anew: python -m tests.faults.page"
