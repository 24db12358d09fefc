"""Later features as additions to the protobuf files: features/*.proto.

Each file has a part for each protobuf file that the feature touches. A part reads like that file without all that is there
already: what it has in a block that the file has too, such as `message TextInput {`, is added at the end of that block,
an import to the imports, and everything else at the end of the file.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from tests.protobuf.contract import Contract

FOLDER = Path(__file__).with_name("features")
FEATURES = sorted(path.stem for path in FOLDER.glob("*.proto"))


def add_feature(contract: Contract, feature: str) -> None:
    """Adds a feature to the files of a contract. Nothing is removed or replaced."""
    text = (FOLDER / f"{feature}.proto").read_text()
    _, *parts = re.split(r"^// File: (\S+)\n", text, flags=re.MULTILINE)
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        lines = part.rstrip().splitlines()
        if (contract.protos / name).exists():
            lines = merged(contract.read(name).splitlines(), lines)
        contract.write(name, "\n".join([*lines, ""]))
        if "google/rpc/status.proto" in part:
            _add_google_rpc(contract)


def merged(present: list[str], added: list[str]) -> list[str]:
    """Returns the lines of a file, or of a block, with those that a part adds to it."""
    lines = [*present]
    for statement in _statements(added):
        first = statement[0]
        if first.startswith("import "):
            imports = [number for number, line in enumerate(lines) if line.startswith("import ")]
            span = slice(imports[0], imports[-1] + 1)
            lines[span] = sorted({*lines[span], first})
        elif first.endswith("{") and first in lines:
            start = lines.index(first) + 1
            end = lines.index(_closing(first), start)
            lines[start:end] = merged(lines[start:end], statement[1:-1])
        elif first.startswith(" "):
            lines += statement
        else:
            lines += ["", *statement]
    return lines


def _statements(lines: list[str]) -> Iterator[list[str]]:
    """Yields each import, field, value, method or block, a block to its end, with the comment above it."""
    statement: list[str] = []
    closing = None
    for line in lines:
        if statement or line:
            statement.append(line)
        if closing is None and line.endswith("{"):
            closing = _closing(line)
        if line == closing or (closing is None and line.endswith((";", "{}"))):
            yield statement
            statement, closing = [], None
    assert not statement, statement


def _closing(head: str) -> str:
    """The line that ends the block of a head, such as `  oneof part {`."""
    return head[: len(head) - len(head.lstrip())] + "}"


def _add_google_rpc(contract: Contract) -> None:
    """Adds google/rpc/status.proto, which other packages have too, as a module that lint ignores."""
    target = contract.folder / "third_party/google/rpc/status.proto"
    if not target.exists():
        target.parent.mkdir(parents=True)
        shutil.copy(str(files("google.rpc") / "status.proto"), target)
        configuration = contract.folder / "buf.yaml"
        own, module = (
            "  - path: proto\n",
            "  - path: third_party\n    lint:\n      ignore:\n        - third_party\n",
        )
        configuration.write_text(configuration.read_text().replace(own, own + module))
