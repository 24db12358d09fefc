"""Packages whose files are on a page of the documentation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def write_package(page: str, folder: Path) -> None:
    """Writes the files of a package to a folder: each is a block below its name."""
    blocks = re.findall(
        r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    for name, text in blocks:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def install_package(source: Path, site: Path) -> None:
    """Installs a package by pip into the folder `site`."""
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", site, source], check=True
    )


def path_with(site: Path) -> str:
    """Returns PYTHONPATH with the folder `site` before what it has."""
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_suite(source: Path, site: Path, *names: str) -> int:
    """Runs files of tests of a package, which must all pass; returns how many tests."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names],
        cwd=source,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert "skipped" not in result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    return int(passed[1])
