"""Pages of lists: their maximum size in entries and bytes, and tokens that are valid for one list only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.accounts.pages import MAX_PAGE_BYTES, first_page, fitting, make_token, page_size, read_token
from pomelo.gen.admin.v1.admin_service_pb2 import Key
from tests.unit.refusals import refused


def test_too_large_a_page_size_is_reduced_and_a_negative_one_refused() -> None:
    assert [page_size(n) for n in (0, 1, 1_000, 1_001, 2**31 - 1)] == [100, 1, 1_000, 1_000, 1_000]
    with refused("invalid_parameter", "page_size"):
        page_size(-1)


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_read_token_returns_the_position_of_a_token(name: str, created: float, key_id: str) -> None:
    name, key_id = name.encode("utf-8", "replace").decode(), key_id.encode("utf-8", "replace").decode()
    token = make_token(name, created, key_id)
    assert read_token(token, name, float, str) == (created, key_id)
    assert token.isascii()
    assert not set(token) & set("+/=")


def test_a_token_has_the_characters_of_base64_for_urls() -> None:
    token = make_token("keys", "\u07fe\u07ff>>>???")
    assert {"-", "_"} <= set(token)
    assert read_token(token, "keys", str) == ("\u07fe\u07ff>>>???",)
    for letter, standard in ("-+", "_/"):
        with refused("invalid_parameter", "page_token"):
            read_token(token.replace(letter, standard), "keys", str)


@pytest.mark.parametrize(
    "token",
    [
        *("x", "ä", "A" * 1_000),
        make_token("keys of other", 1.0, "k"),
        make_token("accounts", "k"),
        make_token("keys of acme", "1.0", "k"),
        make_token("keys of acme", 1.0),
        make_token("keys of acme", 1.0, "k", "more"),
        make_token("keys of acme", 1.0, "k")[:-3],
        *("e30", "W10", "MQ"),
    ],
)
def test_a_token_of_another_list_and_a_malformed_one_are_refused(token: str) -> None:
    with refused("invalid_parameter", "page_token"):
        read_token(token, "keys of acme", float, str)


def test_a_page_has_the_entries_that_fit_and_at_least_one() -> None:
    small, large = Key(id="k"), Key(id="k" * MAX_PAGE_BYTES)
    assert fitting([]) == 0
    assert fitting([small] * 1_000) == 1_000
    assert fitting([large, large]) == 1
    assert fitting([small, large, small]) == 1
    exact = Key(id="k" * (MAX_PAGE_BYTES // 2 - 4))
    assert 2 * exact.ByteSize() == MAX_PAGE_BYTES
    assert fitting([exact, exact]) == 2
    half = Key(id="k" * (MAX_PAGE_BYTES // 2 - 10))
    assert fitting([half, half, half]) == 2


def test_a_first_page_has_a_token_only_if_entries_are_left() -> None:
    keys = [Key(id=name) for name in "abc"]
    page, token = first_page(keys, 2, "keys", lambda last: (keys[last].id,))
    assert [key.id for key in page] == ["a", "b"]
    assert read_token(token, "keys", str) == ("b",)
    assert first_page(keys, 3, "keys", lambda last: (keys[last].id,)) == (keys, "")
    assert read_token("", "keys", str) is None
