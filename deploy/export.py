"""Writes what uv.lock pins as requirements files for pip, which can't read it: `make lock`.

`requirements.txt` is what `make serve` installs without uv, `requirements-dev.txt` what `make test` does.
Each package has its version, the condition under which it is needed, and the hash of every file of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROJECT = "pomelo-tasks"
EXTRA = "sandbox"
"""The extra that both files include."""
BUILD = {"name": "hatchling"}
"""Builds the project itself, from the same lock."""

FILES = {"requirements.txt": False, "requirements-dev.txt": True}
"""The files, and whether they have the dependencies of development."""

_HEAD = "# Made from uv.lock by `make lock`. A test compares them.\n"

_Way = frozenset[str]
"""Conditions that hold together. A package is needed under any of its ways."""


def export(lock: Mapping[str, Any], *, dev: bool) -> str:
    """The requirements file of a lock."""
    packages: dict[str, list[Mapping[str, Any]]] = {}
    for package in lock["package"]:
        packages.setdefault(package["name"], []).append(package)
    (project,) = packages[PROJECT]
    roots = [*project["dependencies"], *project["optional-dependencies"][EXTRA], BUILD]
    if dev:
        roots += [each for group in project["dev-dependencies"].values() for each in group]
    needed = _needed(packages, roots)
    lines = [_HEAD]
    for (name, version), ways in sorted(needed.items()):
        (package,) = [one for one in packages[name] if one["version"] == version]
        lines.append(f"{name}=={version}{_condition(ways)}")
        hashes = sorted({file["hash"] for file in _files(package)})
        lines[-1] += "".join(f" \\\n    --hash={digest}" for digest in hashes) + "\n"
    return "".join(lines)


def _needed(
    packages: Mapping[str, list[Mapping[str, Any]]], roots: Iterable[Mapping[str, Any]]
) -> dict[tuple[str, str], set[_Way]]:
    """The packages that `roots` lead to, by name and version, and the ways on which they do."""
    needed: dict[tuple[str, str], set[_Way]] = {}
    seen: set[tuple[str, str, str, _Way]] = set()
    left: list[tuple[Mapping[str, Any], _Way]] = [(root, frozenset()) for root in roots]
    while left:
        dependency, way = left.pop()
        (package,) = [
            one
            for one in packages[dependency["name"]]
            if one["version"] == dependency.get("version", one["version"])
        ]
        if "marker" in dependency:
            way |= {dependency["marker"]}
        needed.setdefault((package["name"], package["version"]), set()).add(way)
        for extra in ("", *dependency.get("extra", ())):
            place = (package["name"], package["version"], extra, way)
            if place not in seen:
                seen.add(place)
                further = (
                    package.get("optional-dependencies", {})[extra]
                    if extra
                    else package.get("dependencies", ())
                )
                left += [(each, way) for each in further]
    return needed


def _condition(ways: set[_Way]) -> str:
    """Any of the ways, as pip reads it; nothing where one of them has no conditions."""
    least = [way for way in ways if not any(other < way for other in ways)]
    if frozenset() in least:
        return ""
    joined = sorted(
        " and ".join(f"({part})" if " or " in part else part for part in sorted(way)) for way in least
    )
    return " ; " + (joined[0] if len(joined) == 1 else " or ".join(f"({way})" for way in joined))


def _files(package: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from package.get("wheels", ())
    if "sdist" in package:
        yield package["sdist"]


def main() -> None:
    """Writes the files."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    for name, dev in FILES.items():
        (ROOT / "deploy" / name).write_text(export(lock, dev=dev))


if __name__ == "__main__":
    main()
