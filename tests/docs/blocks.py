"""The fenced blocks of the pages of the documentation."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import typer

from pomelo.cli.commands import program

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]


class Block(NamedTuple):
    """A block, and the last heading before it with its marks."""

    page: str
    line: int
    heading: str
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments."""
        lines = re.sub(r"\\\n\s*", " ", self.code).splitlines()
        found = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
        return [" ".join(line.split()) for line in found if line]


def blocks_of(page: Path) -> list[Block]:
    """Returns the blocks of a page in their order. Their code has no indentation in common."""
    found, heading, inside = [], "", ""
    code: list[str] = []
    start, indent, language = 0, "", ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r"^( *)```(\w*)\s*$", line)
        if inside and fence:
            text = "".join(f"{each.removeprefix(indent)}\n" for each in code)
            found.append(Block(page.name, start, heading, language, text))
            inside = ""
        elif inside:
            code.append(line)
        elif fence:
            inside, code, start = "```", [], number
            indent, language = fence[1], fence[2]
        elif line.startswith("#"):
            heading = line
    assert not inside, f"{page.name}: a block without its end"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def check_pomelo(text: str) -> None:
    """Asserts that a command of Pomelo exists with its arguments."""
    command, words = typer.main.get_command(program()), shlex.split(text)[1:]
    while words and words[0] in (inner := getattr(command, "commands", {})):
        command, words = inner[words[0]], words[1:]
    assert not getattr(command, "commands", None), f"{text!r} is not a whole command"
    if words:
        command.make_context(text, words)
