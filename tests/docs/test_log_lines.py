"""The log lines in docs/troubleshooting.md: each line of the level WARNING or above in the code, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n## Log lines\n")[2]
DOCUMENTED = [
    span
    for row in re.findall(r"^\| (`.*?) \|", SECTION, re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", row)
]
WITHOUT_A_CALL = {"attempt failed"}
"""Written by the log of tasks."""

LEVELS = ("warning", "error", "critical")
PLACEHOLDER = re.compile(r"%[-.\d]*[a-z]")


def logged() -> set[str]:
    """Returns the texts that the code logs as WARNING or above, with `…` for each value."""
    found = set()
    for package in ("pomelo", "gateway"):
        for path in (ROOT / package).rglob("*.py"):
            if not {"gen", "testing"} & set(path.parts):
                found |= {text for call in calls(path) if (text := text_of(call))}
    return found


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def text_of(call: ast.Call) -> str:
    """Returns the text that a call logs; empty if it logs none, or one that its caller names."""
    name = ast.unparse(call.func)
    texts = [text for arg in call.args if (text := constant(arg))]
    is_log = re.fullmatch(rf"(self\.)?_?log\.({'|'.join(LEVELS)}|log)", name)
    is_unexpected = re.search(r"unexpected(_errors)?\.log$|^periodically$", name)
    if not texts or not (is_log or is_unexpected):
        return ""
    text = PLACEHOLDER.sub("…", texts[0].partition("\n")[0])
    return text if text.strip("…") else ""


def constant(node: ast.expr) -> str:
    """Returns the text of a literal, with %s for each value in it; empty if it is not a literal."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(constant(part) or "%s" for part in parts)
    return ""


def describes(documented: str, text: str) -> bool:
    """Whether a documented line is a text, or its beginning; an ellipsis stands for anything."""
    pattern = ".*".join(re.escape(part) for part in documented.split("…"))
    return re.match(pattern, text) is not None


def test_every_line_of_the_code_is_documented() -> None:
    texts = logged()
    assert len(texts) > 50
    missing = {text for text in texts if not any(describes(line, text) for line in DOCUMENTED)}
    assert missing == set()


def test_every_documented_line_is_in_the_code() -> None:
    texts = logged()
    stale = {line for line in DOCUMENTED if not any(describes(line, text) for text in texts)}
    assert stale == WITHOUT_A_CALL
