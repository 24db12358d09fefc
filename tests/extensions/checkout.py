"""A copy of the project to which a test adds something, and in which it runs tests."""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Checkout:
    """A copy of the project in `folder`, to which lines and files can only be added."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("pomelo", "gateway", "proto", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)

    def add_files(self, name: str) -> None:
        """Adds the files of a folder beside this module."""
        shutil.copytree(Path(__file__).with_name(name), self._folder, dirs_exist_ok=True)

    def add_after(self, path: str, anchor: str, lines: str) -> None:
        """Adds lines to a file, after the only line that is `anchor` without its indentation."""
        file = self._folder / path
        text = file.read_text().splitlines()
        (index,) = [number for number, line in enumerate(text) if line.strip() == anchor]
        file.write_text("\n".join([*text[: index + 1], lines, *text[index + 1 :], ""]))

    def generate(self) -> None:
        """Generates the modules of the protobuf files, as `make gen` does."""
        self._run("proto/generate.py")

    def pytest(self, *arguments: str) -> None:
        """Runs tests in the copy. They must pass."""
        self._run("-m", "pytest", "-p", "no:cacheprovider", *arguments)

    def additions(self) -> dict[str, int | str]:
        """The files of code, protobuf and TOML that differ from the project's: the number of added lines, or
        "new". Without tests and generated files."""
        added: dict[str, int | str] = {}
        for file in self._folder.rglob("*"):
            path = file.relative_to(self._folder)
            if (
                file.suffix not in (".py", ".proto", ".toml")
                or path.parts[0] == "tests"
                or path.parts[:2] == ("pomelo", "gen")
            ):
                continue
            if not (ROOT / path).exists():
                added[str(path)] = "new"
            elif (after := file.read_bytes()) != (before := (ROOT / path).read_bytes()):
                changes = [*difflib.ndiff(before.decode().splitlines(), after.decode().splitlines())]
                assert not any(line.startswith("-") for line in changes), path
                added[str(path)] = sum(line.startswith("+") for line in changes)
        return added

    def _run(self, *arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(self._folder), "PYTHONDONTWRITEBYTECODE": "1"}
        for variable in [name for name in environment if name.startswith("PYTEST_")]:
            del environment[variable]
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=270,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
