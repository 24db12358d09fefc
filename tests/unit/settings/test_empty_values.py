"""What a file of settings may begin with, and values that are empty or have white space around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.settings import SettingsError, load


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_bytes(b"\xef\xbb\xbf" + b'rest = "127.0.0.1:1"\n')
    assert load(config, {}).rest == "127.0.0.1:1"


def test_an_empty_secret_is_none_and_an_empty_folder_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('secret = ""\n')
    assert load(config, {}).secret == ""
    config.write_text('data = ""\n')
    with pytest.raises(SettingsError, match=r"must be a folder, such as \.pomelo"):
        load(config, {})


def test_a_previous_secret_is_accepted_with_and_without_the_line_end_that_it_may_have_had() -> None:
    given = load(None, {"POMELO_SECRET_PREVIOUS": f" {'a' * 32}\n, {'b' * 32}"})
    assert given.secret_previous == ("a" * 32, "a" * 32 + "\n", "b" * 32)
