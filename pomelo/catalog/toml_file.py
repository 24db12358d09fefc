"""A TOML file with the line numbers of its keys, for messages that say where a value is wrong.

tomllib reads the file; it keeps no positions. A scan finds them: only in a file that tomllib has accepted,
and only when there is something to report.
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
"""Where a value is: the names of tables and keys, and indexes of lists."""

_SHOWN = 100
"""Characters of a key that are shown."""

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
    """Something wrong in a file. `said` says what is wrong and what to write instead, as a sentence."""

    file: TomlFile
    keys: Keys
    said: str

    def __str__(self) -> str:
        """One line: file, line, key, and what is wrong."""
        where = f"{dotted(self.keys)}: " if self.keys else ""
        text = f"{self.file.path}:{self.line}: {where}{self.said}"
        return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)

    @property
    def line(self) -> int:
        """The number of its line, from 1."""
        return self.file.line(self.keys)


@dataclass(frozen=True)
class TomlFile:
    """A file, and what tomllib reads from it. An unreadable file is empty and has a fault."""

    path: Path
    text: str = ""
    table: Mapping[str, Any] = field(default_factory=dict)
    unreadable: tuple[int, str] | None = None
    """The line that can't be read, and why."""

    @classmethod
    def read(cls, path: Path) -> TomlFile:
        """Reads a file.

        Raises:
            OSError: it can't be opened.
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
            found = _AT_LINE.search(str(error))
            line = int(found[1]) if found else text.count("\n") + 1
            said = f"The file is not TOML: {_AT_LINE.sub('', str(error))}. Correct this line"
            return cls(path, text, unreadable=(line, said))
        except RecursionError:
            return cls(path, text, unreadable=(1, "The file is nested too deeply. Write flat tables"))

    @cached_property
    def _lines(self) -> Mapping[Keys, int]:
        return line_numbers(self.text)

    def line(self, keys: Keys) -> int:
        """The line of the innermost of these keys that has one; 1 if there is none."""
        if self.unreadable is not None:
            return self.unreadable[0]
        for end in range(len(keys), 0, -1):
            if (line := self._lines.get(keys[:end])) is not None:
                return line
        return 1

    def fault(self, keys: Keys, said: str) -> Fault:
        """A fault of the value at `keys`."""
        return Fault(self, keys, said)


def dotted(keys: Keys) -> str:
    """Keys as TOML writes them, such as models."gpt-3.5-turbo".routes[0].clamp."""
    shown = ""
    for key in keys:
        if isinstance(key, int):
            shown += f"[{key}]"
        else:
            cut = key if len(key) <= _SHOWN else key[:_SHOWN] + "…"
            shown += ("." if shown else "") + (cut if _BARE.fullmatch(cut) else json.dumps(cut))
    return shown


class _Scan:
    """The state of a scan: the current table, and the keys of the statement that is being read."""

    def __init__(self) -> None:
        self.lines: dict[Keys, int] = {}
        self._last: dict[Keys, int] = {}
        """Arrays of tables, and the index of the last table of each."""
        self._table: Keys = ()

    def header(self, names: list[str], line: int, *, is_array: bool) -> None:
        """`[names]` or `[[names]]`."""
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
        """`names = …`."""
        for end in range(1, len(names) + 1):
            self._note((*self._table, *names[:end]), line)

    def _element(self, keys: Keys) -> Keys:
        return (*keys, self._last[keys]) if keys in self._last else keys

    def _note(self, keys: Keys, line: int) -> None:
        self.lines.setdefault(keys, line)


def line_numbers(text: str) -> dict[Keys, int]:
    """The line of each table and key of a TOML text; keys within an inline value are left out."""
    scan = _Scan()
    names: list[str] = []
    brackets = depth = 0
    in_key = True
    line = 1
    for token in _TOKEN.finditer(text):
        word, here = token[0], line
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
                scan.header(names, here, is_array=brackets == 2)
                in_key = False
            case "mark" if in_key and word == "=":
                scan.value(names, here)
                in_key = False
            case "mark":
                depth += (word in "[{") - (word in "]}")
    return scan.lines
