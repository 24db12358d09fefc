"""Exports uv.lock as requirements files for pip, which can't read it: `make lock`.

`requirements.txt` is what `make serve` installs without uv, `requirements-dev.txt` what `make test` installs,
those in `docker/` what the images contain. Each package has its version, its environment marker, and the
hashes of all its files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROJECT = "pomelo-tasks"
BUILD = {"name": "hatchling"}
"""The build backend of the project, from the same lock."""


@dataclass(frozen=True)
class Selection:
    """The packages of a file: the project's with `extras`, its build backend, and its tools."""

    extras: tuple[str, ...] = ()
    project: bool = True
    build: bool = False
    dev: bool = False


_SERVICES = ("otel", "postgres", "s3")
FILES = {
    "requirements.txt": Selection(("sandbox",), build=True),
    "requirements-dev.txt": Selection(("sandbox",), build=True, dev=True),
    "docker/requirements-build.txt": Selection(project=False, build=True),
    "docker/requirements-slim.txt": Selection(_SERVICES),
    "docker/requirements-full.txt": Selection((*_SERVICES, "sandbox")),
}
"""The files, relative to this folder."""

_HEADER = "# Generated from uv.lock by `make lock`. A test compares them.\n"

_Markers = frozenset[str]
"""Environment markers that all have to apply."""


def export(lock: Mapping[str, Any], selection: Selection) -> str:
    """Returns the requirements file of a lock."""
    packages: dict[str, list[Mapping[str, Any]]] = {}
    for package in lock["package"]:
        packages.setdefault(package["name"], []).append(package)
    (project,) = packages[PROJECT]
    roots = _roots(project, selection)
    lines = [_HEADER]
    for (name, version), alternatives in sorted(_resolve(packages, roots).items()):
        (package,) = [one for one in packages[name] if one["version"] == version]
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
        hashes = sorted({file["hash"] for file in files})
        lines.append(f"{name}=={version}{_marker(alternatives)}")
        lines[-1] += "".join(f" \\\n    --hash={digest}" for digest in hashes) + "\n"
    return "".join(lines)


def _roots(project: Mapping[str, Any], selection: Selection) -> list[Mapping[str, Any]]:
    """Returns the direct dependencies of a selection, from the project's entry in the lock."""
    roots = [*project["dependencies"]] if selection.project else []
    for extra in selection.extras:
        roots += project["optional-dependencies"][extra]
    if selection.build:
        roots.append(BUILD)
    if selection.dev:
        roots += [dependency for group in project["dev-dependencies"].values() for dependency in group]
    return roots


def _resolve(
    packages: Mapping[str, list[Mapping[str, Any]]], roots: Iterable[Mapping[str, Any]]
) -> dict[tuple[str, str], set[_Markers]]:
    """Returns the required packages, by name and version, with the alternative markers that require them."""
    required: dict[tuple[str, str], set[_Markers]] = {}
    visited: set[tuple[str, str, str, _Markers]] = set()
    pending: list[tuple[Mapping[str, Any], _Markers]] = [(root, frozenset()) for root in roots]
    while pending:
        dependency, markers = pending.pop()
        (package,) = [
            one
            for one in packages[dependency["name"]]
            if one["version"] == dependency.get("version", one["version"])
        ]
        if "marker" in dependency:
            markers |= {dependency["marker"]}
        required.setdefault((package["name"], package["version"]), set()).add(markers)
        for extra in ("", *dependency.get("extra", ())):
            visit = (package["name"], package["version"], extra, markers)
            if visit not in visited:
                visited.add(visit)
                dependencies = (
                    package.get("optional-dependencies", {})[extra]
                    if extra
                    else package.get("dependencies", ())
                )
                pending += [(each, markers) for each in dependencies]
    return required


def _marker(alternatives: set[_Markers]) -> str:
    """Returns the alternatives as one marker of pip; empty if the package is required without conditions."""
    weakest = [one for one in alternatives if not any(other < one for other in alternatives)]
    if frozenset() in weakest:
        return ""
    joined = sorted(
        " and ".join(f"({part})" if " or " in part else part for part in sorted(one)) for one in weakest
    )
    return " ; " + (joined[0] if len(joined) == 1 else " or ".join(f"({part})" for part in joined))


def main() -> None:
    """Writes the files."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    for name, selection in FILES.items():
        (ROOT / "deploy" / name).write_text(export(lock, selection))


if __name__ == "__main__":
    main()
