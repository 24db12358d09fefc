"""Pages of lists: sizes that are coerced, tokens that are good for one list alone, and bounded bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.accounts.pages import MAX_PAGE_BYTES, fitting, make_token, page_size, read_token
from pomelo.errors import PomeloError
from pomelo.gen.v1.admin_service_pb2 import Key


def test_a_size_that_is_too_large_is_coerced_and_one_below_0_refused():
    assert [page_size(asked) for asked in (0, 1, 1_000, 1_001, 2**31 - 1)] == [100, 1, 1_000, 1_000, 1_000]
    with pytest.raises(PomeloError) as caught:
        page_size(-1)
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", "page_size")


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_a_token_gives_its_place_back(what: str, created: float, key_id: str):
    what, key_id = what.encode("utf-8", "replace").decode(), key_id.encode("utf-8", "replace").decode()
    token = make_token(what, created, key_id)
    assert read_token(token, what, float, str) == [created, key_id]
    assert token.isascii()
    assert not set(token) & set("+/=")


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "ä",
        "A" * 1_000,
        make_token("keys of other", 1.0, "k"),
        make_token("accounts", "k"),
        make_token("keys of acme", "1.0", "k"),
        make_token("keys of acme", 1.0),
        make_token("keys of acme", 1.0, "k", "more"),
        make_token("keys of acme", 1.0, "k")[:-3],
        "e30",
        "W10",
        "MQ",
    ],
)
def test_a_token_of_another_list_or_of_none_is_refused(token: str):
    with pytest.raises(PomeloError) as caught:
        read_token(token, "keys of acme", float, str)
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", "page_token")


def test_a_page_takes_what_fits_into_its_bytes_and_at_least_one_entry():
    small, large = Key(key_id="k"), Key(key_id="k" * MAX_PAGE_BYTES)
    assert fitting([]) == 0
    assert fitting([small] * 1_000) == 1_000
    assert fitting([large, large]) == 1
    assert fitting([small, large, small]) == 1
    half = Key(key_id="k" * (MAX_PAGE_BYTES // 2 - 10))
    assert fitting([half, half, half]) == 2
