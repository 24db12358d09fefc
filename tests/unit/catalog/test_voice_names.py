"""Names and ids of voices."""

from __future__ import annotations

import pytest

from pomelo.catalog.voice_names import is_id, is_name, normalize


@pytest.mark.parametrize("name", ["a", "a" * 64, "My Voice", "ß漢"])
def test_a_name_has_1_to_64_printable_characters(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "a\n", "\x00"])
def test_other_texts_are_no_names(name: str) -> None:
    assert not is_name(name)


def test_an_id_can_be_a_part_of_a_url() -> None:
    assert all(map(is_id, ("a", "A-b_9", "a" * 64)))
    assert not any(map(is_id, ("", "a" * 65, "a/b", "a b", "ä", "a\n")))


def test_names_are_compared_without_case_spaces_and_composition() -> None:
    assert normalize("  My \t VOICE ") == "my voice"
    assert normalize("Cafe\u0301") == normalize("CAFÉ")
    assert normalize("Straße") == normalize("STRASSE")
