"""The lines of the values of a TOML file, and the errors of unreadable files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.catalog.toml_file import TomlFile, dotted, line_numbers

TEXT = """\
# a comment with [models.no]
title = "x"
[models."gpt-3.5"] # here
price = { image = "1" }
drop = [
  "[a]", # inline
  "b",
]
after.all = 1
note = '''
[not.a.table]
'''
[[models."gpt-3.5".routes]]
provider = "p"
[[models."gpt-3.5".routes]]
provider = "q"
[models."gpt-3.5".routes.options]
top = 1
"""


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("title",), 2),
        (("models",), 3),
        (("models", "gpt-3.5"), 3),
        (("models", "gpt-3.5", "price"), 4),
        (("models", "gpt-3.5", "drop"), 5),
        (("models", "gpt-3.5", "after"), 9),
        (("models", "gpt-3.5", "after", "all"), 9),
        (("models", "gpt-3.5", "note"), 10),
        (("models", "gpt-3.5", "routes"), 13),
        (("models", "gpt-3.5", "routes", 0), 13),
        (("models", "gpt-3.5", "routes", 0, "provider"), 14),
        (("models", "gpt-3.5", "routes", 1), 15),
        (("models", "gpt-3.5", "routes", 1, "provider"), 16),
        (("models", "gpt-3.5", "routes", 1, "options"), 17),
        (("models", "gpt-3.5", "routes", 1, "options", "top"), 18),
        (("models", "gpt-3.5", "price", "image"), 4),
        (("hosts", "none"), 1),
    ],
)
def test_a_value_has_the_line_of_its_key_or_of_the_table_around_it(
    tmp_path: Path, keys: tuple[str | int, ...], line: int
) -> None:
    path = tmp_path / "a.toml"
    for ends in ("\n", "\r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", ends).encode())
        assert TomlFile.read(path).line(keys) == line


def test_values_within_lists_and_texts_have_no_lines() -> None:
    assert not [keys for keys in line_numbers(TEXT) if {"no", "not", "a"} & set(keys)]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"a = 1\nb = \xff\n", "2: The file is not UTF-8 text"),
        (b"a = 1\nb = \n", "2: The file is not TOML"),
        (b"a = 1\nb = [", "2: The file is not TOML"),
        (b"a = " + b"[" * 100_000, "1: The file is nested too deeply"),
    ],
)
def test_an_unreadable_file_is_a_fault_at_a_line(tmp_path: Path, data: bytes, fault: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(data)
    file = TomlFile.read(path)
    assert file.unreadable is not None
    assert str(file.fault((), file.unreadable[1])).startswith(f"{path}:{fault}")


def test_keys_are_shown_in_the_syntax_of_toml_and_without_control_characters(tmp_path: Path) -> None:
    assert dotted(("models", "gpt-3.5", "routes", 0, "x")) == 'models."gpt-3.5".routes[0].x'
    assert dotted(("k" * 100,)) == "k" * 100
    assert dotted(("k" * 101,)).startswith('"' + "k" * 100)
    assert "\x9b" not in str(TomlFile(tmp_path).fault(("a",), "b\x9bc"))
