"""A copy of the protobuf files in a git repository of its own, for tests that change them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Neither the tests' own repository nor the settings of the user that runs them.
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "MAKE", "MFLAGS"))
} | {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


class Contract:
    """A copy of the project's protobuf files, with its buf.yaml and its Makefile, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.protos = folder / "proto"
        shutil.copytree(ROOT / "proto", self.protos, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("buf.yaml", "Makefile"):
            shutil.copy(ROOT / name, folder)
        self.git("init", "--quiet")

    def git(self, *arguments: str) -> None:
        """Runs git."""
        identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *identity, *arguments], cwd=self.folder, env=ENVIRONMENT, check=True)

    def release(self, tag: str) -> None:
        """Commits all files and tags the commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", tag)
        self.git("tag", tag)

    def run(self, *command: str) -> tuple[bool, str]:
        """Runs a command; returns whether it succeeded, and its output."""
        result = subprocess.run(
            command,
            cwd=self.folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=270,
            check=False,
        )
        return result.returncode == 0, result.stdout

    def make(self, target: str) -> tuple[bool, str]:
        """Makes a target of the Makefile without installing anything; returns as `run`."""
        return self.run("make", "--no-print-directory", "--old-file=.venv/.dev", target)

    def names(self) -> list[str]:
        """All files, as they import each other."""
        return sorted(str(path.relative_to(self.protos)) for path in self.protos.rglob("*.proto"))

    def read(self, name: str) -> str:
        """The text of a file."""
        return (self.protos / name).read_text()

    def write(self, name: str, text: str) -> None:
        """Writes a file."""
        (self.protos / name).parent.mkdir(parents=True, exist_ok=True)
        (self.protos / name).write_text(text)

    def replace(self, name: str, old: str, new: str) -> None:
        """Replaces the only occurrence of a text in a file."""
        before, found, after = self.read(name).partition(old)
        assert found, f"{name} has no {old!r}"
        assert old not in after, f"{name} has {old!r} more than once"
        self.write(name, before + new + after)

    def cut(self, name: str, block: str) -> str:
        """Removes a block of the first level, such as `message Word`, with its comment, and returns it."""
        found = re.search(rf"(?:^// .*\n)*^{block} {{\n(?:.*\n)*?}}\n", self.read(name), re.MULTILINE)
        assert found, f"{name} has no {block}"
        self.replace(name, found[0], "")
        return found[0]
