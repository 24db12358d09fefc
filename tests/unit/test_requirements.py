"""pip installs exactly the versions and hashes that uv.lock pins."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from deploy.export import BUILD, FILES, PROJECT, ROOT, Selection, export

LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
PACKAGES = {(package["name"], package["version"]): package for package in LOCK["package"]}
ENVIRONMENTS = [
    {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": platform,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    for python in ("3.11.1", "3.11.7", "3.12.4", "3.13.0", "3.15.0")
    for platform in ("linux", "darwin", "win32")
]


def pinned(name: str) -> list[tuple[Requirement, set[str]]]:
    found: list[tuple[Requirement, set[str]]] = []
    for block in (ROOT / "deploy" / name).read_text().replace(" \\\n", "\n").split("\n"):
        if block.startswith("    --hash="):
            found[-1][1].add(block.removeprefix("    --hash="))
        elif block and not block.startswith("#"):
            found.append((Requirement(block), set()))
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_generated_from_the_lock_file(name: str) -> None:
    written = (ROOT / "deploy" / name).read_text()
    assert written == export(LOCK, FILES[name]), "run: make lock"


def test_every_python_gets_the_versions_that_are_tested() -> None:
    assert len({name for name, _ in PACKAGES}) == len(PACKAGES)


@pytest.mark.parametrize("name", FILES)
def test_every_requirement_is_pinned_to_the_files_of_the_lock(name: str) -> None:
    requirements = pinned(name)
    assert len(requirements) > 1
    for requirement, hashes in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        package = PACKAGES[requirement.name, specifier.version]
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
        assert hashes == {file["hash"] for file in files} != set()
        assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in hashes)


def needed(environment: Mapping[str, str], selection: Selection) -> set[tuple[str, str]]:
    """Returns the packages that the lock file requires in an environment, resolved transitively."""
    (project,) = [package for package in LOCK["package"] if package["name"] == PROJECT]
    left: list[Any] = list(project["dependencies"]) if selection.project else []
    left += [
        dependency for extra in selection.extras for dependency in project["optional-dependencies"][extra]
    ]
    left += [BUILD] if selection.build else []
    left += project["dev-dependencies"]["dev"] if selection.dev else []
    found: set[tuple[str, str]] = set()
    followed: set[tuple[str, str, str]] = set()
    while left:
        dependency = left.pop()
        if "marker" in dependency and not Marker(dependency["marker"]).evaluate(dict(environment)):
            continue
        versions = [version for name, version in PACKAGES if name == dependency["name"]]
        version = dependency.get("version", versions[0])
        found.add((dependency["name"], version))
        package = PACKAGES[dependency["name"], version]
        for extra in ("", *dependency.get("extra", ())):
            if (place := (dependency["name"], version, extra)) not in followed:
                followed.add(place)
                left += package["optional-dependencies"][extra] if extra else package.get("dependencies", ())
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "environment", ENVIRONMENTS, ids=lambda e: f"{e['python_full_version']} {e['sys_platform']}"
)
def test_in_every_environment_pip_installs_what_uv_does(name: str, environment: dict[str, str]) -> None:
    installed = {
        (requirement.name, next(iter(requirement.specifier)).version)
        for requirement, _ in pinned(name)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    assert installed == needed(environment, FILES[name])
    assert len({name for name, _ in installed}) == len(installed), "one version of each"


def test_the_lock_is_of_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (locked,) = [package for package in LOCK["package"] if package["name"] == PROJECT]

    def asked(texts: list[str]) -> set[tuple[str, str, str]]:
        found = [Requirement(text) for text in texts]
        return {(one.name, str(one.specifier), ",".join(sorted(one.extras))) for one in found}

    def kept(entries: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
        return {
            (
                e["name"],
                str(SpecifierSet(e.get("specifier", ""))),
                ",".join(sorted(e.get("extras", e.get("extra", ())))),
            )
            for e in entries
            if "extra ==" not in e.get("marker", "")
        }

    assert kept(locked["metadata"]["requires-dist"]) == asked(project["project"]["dependencies"]), (
        "run: make lock"
    )
    assert kept(locked["metadata"]["requires-dev"]["dev"]) == asked(project["dependency-groups"]["dev"])
    extras = project["project"]["optional-dependencies"]
    assert set(locked["metadata"]["provides-extras"]) == set(extras)
    for extra, texts in extras.items():
        locked_names = {each["name"] for each in locked["optional-dependencies"][extra]}
        assert locked_names == {Requirement(text).name for text in texts}


@pytest.mark.parametrize(
    ("target", "name"), [(".venv/.serve", "requirements.txt"), (".venv/.dev", "requirements-dev.txt")]
)
def test_make_installs_without_uv_by_hashes_alone(target: str, name: str, tmp_path: Path) -> None:
    # Neither uv nor pip is run: make says what it would do.
    commands = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    installing = [
        part
        for part in commands.replace("\\\n", " ").replace("; fi", "").split("&&")
        if "pip install" in part
    ]
    assert len(installing) == 2
    assert f"--no-deps --require-hashes --requirement deploy/{name}" in " ".join(installing[0].split())
    assert "--no-deps --no-build-isolation --editable ." in " ".join(installing[1].split())
