"""A TOML file with the line numbers of its keys, so that messages can give the position of a wrong value.

tomllib parses the file but keeps no positions. A scan finds them when they are needed, in a file that tomllib
has accepted.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Keys = tuple[str | int, ...]
"""The path of a value: names of tables and keys, and indexes of lists."""

_MAX_KEY_LENGTH = 100
"""Characters of a key that messages show."""

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_AT_LINE = re.compile(r" \(at line (\d+), column \d+\)$")
_TOKEN = re.compile(
    r'''
      (?P<blank>   [^\S\n]+ | \#[^\n]* )
    | (?P<newline> \n )
    | (?P<text>    """(?:\\.|[^\\])*?"""(?:"{0,2}) | \'\'\'.*?\'\'\'(?:'{0,2})
                 | "(?:\\.|[^"\\\n])*" | '[^'\n]*' )
    | (?P<bare>    [A-Za-z0-9_-]+ )
    | (?P<mark>    . )
    ''',
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Fault:
    """An error in a file. `message` says what is wrong and what to write instead."""

    file: TomlFile
    keys: Keys
    message: str

    def __str__(self) -> str:
        """One line: file, line, key and message."""
        where = f"{dotted(self.keys)}: " if self.keys else ""
        text = f"{self.file.path}:{self.line}: {where}{self.message}"
        return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)

    @property
    def line(self) -> int:
        """The line number of the value, from 1."""
        return self.file.line(self.keys)


@dataclass(frozen=True)
class TomlFile:
    """A file and its parsed contents. The contents of an unreadable file are empty."""

    path: Path
    text: str = ""
    table: Mapping[str, Any] = field(default_factory=dict)
    unreadable: tuple[int, str] | None = None
    """The line of the error, and a message; None for a readable file."""

    @classmethod
    def read(cls, path: Path) -> TomlFile:
        """Reads and parses a file.

        Raises:
            OSError: it can't be read.
        """
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            return cls(path, unreadable=(line, "The file is not UTF-8 text. Save it as UTF-8"))
        try:
            return cls(path, text, tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            match = _AT_LINE.search(str(error))
            line = int(match[1]) if match else text.count("\n") + 1
            message = f"The file is not TOML: {_AT_LINE.sub('', str(error))}. Correct this line"
            return cls(path, text, unreadable=(line, message))
        except RecursionError:
            return cls(path, text, unreadable=(1, "The file is nested too deeply. Write flat tables"))

    @cached_property
    def _lines(self) -> Mapping[Keys, int]:
        return line_numbers(self.text)

    def line(self, keys: Keys) -> int:
        """The line number of the value at `keys`, or of the innermost table around it with a line; else 1."""
        if self.unreadable is not None:
            return self.unreadable[0]
        for end in range(len(keys), 0, -1):
            if (line := self._lines.get(keys[:end])) is not None:
                return line
        return 1

    def fault(self, keys: Keys, message: str) -> Fault:
        return Fault(self, keys, message)


def dotted(keys: Keys) -> str:
    """Keys in TOML syntax, such as models."gpt-3.5-turbo".routes[0].clamp."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            cut = key if len(key) <= _MAX_KEY_LENGTH else key[:_MAX_KEY_LENGTH] + "…"
            text += ("." if text else "") + (cut if _BARE.fullmatch(cut) else json.dumps(cut))
    return text


class _Scan:
    """The state of a scan: the lines found so far, and the current table."""

    def __init__(self) -> None:
        self.lines: dict[Keys, int] = {}
        self._last: dict[Keys, int] = {}
        """Array of tables -> the index of its last table."""
        self._table: Keys = ()

    def header(self, names: list[str], line: int, *, is_array: bool) -> None:
        """Records `[names]` or `[[names]]`."""
        self._table = ()
        for name in names[:-1]:
            self._note((*self._table, name), line)
            self._table = self._element((*self._table, name))
        keys = (*self._table, *names[-1:])
        self._note(keys, line)
        if is_array:
            self._last[keys] = self._last.get(keys, -1) + 1
            keys = self._element(keys)
            self._note(keys, line)
        self._table = keys

    def value(self, names: list[str], line: int) -> None:
        """Records `names = …`."""
        for end in range(1, len(names) + 1):
            self._note((*self._table, *names[:end]), line)

    def _element(self, keys: Keys) -> Keys:
        return (*keys, self._last[keys]) if keys in self._last else keys

    def _note(self, keys: Keys, line: int) -> None:
        self.lines.setdefault(keys, line)


def line_numbers(text: str) -> dict[Keys, int]:
    """The line number of each table and key of a TOML text, except keys within inline values."""
    scan = _Scan()
    names: list[str] = []
    brackets = depth = 0
    in_key = True
    line = 1
    for token in _TOKEN.finditer(text):
        word = token[0]
        line += word.count("\n")
        match token.lastgroup:
            case "blank":
                pass
            case "newline":
                if depth <= 0:  # a value ends with its line, unless it is a list
                    names, brackets, depth, in_key = [], 0, 0, True
            case "text" | "bare" if in_key:
                names.append(word if token.lastgroup == "bare" else tomllib.loads(f"k = {word}")["k"])
            case "mark" if in_key and word == "[":
                brackets += 1
            case "mark" if in_key and word == "]":
                scan.header(names, line, is_array=brackets == 2)
                in_key = False
            case "mark" if in_key and word == "=":
                scan.value(names, line)
                in_key = False
            case "mark":
                depth += (word in "[{") - (word in "]}")
    return scan.lines
