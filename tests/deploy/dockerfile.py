"""Reads a Dockerfile, and builds its images without Docker: in folders, with chroot."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath


@dataclass
class Stage:
    """A stage: its name, the base, and the instructions after FROM as (name, arguments)."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, name: str) -> str:
        """Returns the arguments of the last instruction of that name."""
        return [arguments for each, arguments in self.instructions if each == name][-1]

    def all(self, name: str) -> list[str]:
        """Returns the arguments of all instructions of that name."""
        return [arguments for each, arguments in self.instructions if each == name]


def read_stages(path: Path) -> list[Stage]:
    """Returns the stages of a Dockerfile, with the defaults of global ARGs in their bases."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    variables: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, arguments = line.partition(" ")
        arguments = " ".join(arguments.split()) if name != "RUN" else arguments.strip()
        if name == "FROM":
            base, _, stage = arguments.partition(" AS ")
            stages.append(Stage(stage, expand(base, variables)))
        elif not stages:
            assert name == "ARG", line
            key, _, value = arguments.partition("=")
            variables[key] = value
        else:
            stages[-1].instructions.append((name, arguments))
    return stages


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replaces `${NAME}`."""
    return re.sub(r"\$\{(\w+)\}", lambda match: variables.get(match[1], ""), text)


@dataclass
class Image:
    """A built image: its root folder, and what its instructions say about a container."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


class Builder:
    """Builds stages in folders of `work`. `context` is the folder that COPY reads, `make_base` creates the root of a
    base image in a folder. `variables` are additional ones of every RUN."""

    def __init__(
        self, context: Path, work: Path, make_base: Callable[[str, Path], None], variables: Mapping[str, str]
    ) -> None:
        self._context, self._work, self._make_base = context, work, make_base
        self._variables = dict(variables)
        self.images: dict[str, Image] = {}

    def build(self, stage: Stage) -> Image:
        """Builds a stage; those that it needs must have been built."""
        root = self._work / stage.name
        if stage.base in self.images:
            source = self.images[stage.base]
            subprocess.run(["cp", "-a", source.root, root], check=True)
            image = replace(source, root=root, environment=dict(source.environment))
        else:
            self._make_base(stage.base, root)
            image = Image(root, {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
        for name, arguments in stage.instructions:
            self._apply(image, name, arguments)
        self.images[stage.name] = image
        return image

    def _apply(self, image: Image, name: str, arguments: str) -> None:
        match name:
            case "ENV":
                pairs = (pair.split("=", 1) for pair in shlex.split(arguments))
                image.environment |= {key: expand(value, image.environment) for key, value in pairs}
            case "WORKDIR":
                image.folder = arguments
                (image.root / arguments.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "RUN":
                environment = {**self._variables, **image.environment}
                command = ["chroot", str(image.root), "/bin/sh", "-ec", f"cd {image.folder}; {arguments}"]
                subprocess.run(command, env=environment, check=True)
            case "COPY":
                self._copy(image, shlex.split(arguments))
            case "USER":
                image.user = arguments
            case "ENTRYPOINT":
                image.entrypoint, image.command = json.loads(arguments), []
            case "CMD":
                image.command = json.loads(arguments)
            case "HEALTHCHECK":
                image.health = json.loads(arguments.partition("CMD ")[2])
            case "ARG" | "LABEL" | "VOLUME" | "EXPOSE" | "STOPSIGNAL":
                pass
            case _:
                raise AssertionError(f"{name} is not supported")

    def _copy(self, image: Image, words: list[str]) -> None:
        context = self._context
        if words[0].startswith("--from="):
            context = self.images[words.pop(0).removeprefix("--from=")].root
        *sources, target = words
        ignored = shutil.ignore_patterns("__pycache__")
        place = image.root / str(PurePosixPath(image.folder) / target).lstrip("/")
        for source in (context / each.lstrip("/") for each in sources):
            if source.is_dir():
                shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True, ignore=ignored)
            else:
                file = place / source.name if target.endswith("/") else place
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, file)


def is_sent(path: str, ignore_file: Path) -> bool:
    """Whether a file is part of the context by the patterns of a .dockerignore; the last match decides."""
    sent = True
    for line in ignore_file.read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep, pattern = pattern.startswith("!"), pattern.lstrip("!")
        parts = [PurePosixPath(path), *PurePosixPath(path).parents]
        if any(fnmatch(str(part), pattern) or fnmatch(f"/{part}", pattern) for part in parts):
            sent = keep
    return sent


def container_command(image: Image, arguments: list[str], mounts: Mapping[str, Path]) -> list[str]:
    """Returns a command that runs arguments as a container would: as the image's user without capabilities, with a
    read-only root, a new /tmp, and `mounts` (path inside -> folder)."""
    user, group = image.user.split(":")
    root = str(image.root)
    script = [f"mount --bind {root} {root}", f"mount -t tmpfs tmpfs {root}/tmp"]
    script += [f"mount --bind {folder} {root}{path}" for path, folder in mounts.items()]
    script += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    script += [f"mount -o remount,bind,ro {root}"]
    inside = f"cd {image.folder} && exec {shlex.join(arguments)}"
    identity = (
        f"--reuid {user} --regid {group} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
    )
    script += [f"exec chroot {root} setpriv {identity} /bin/sh -c {shlex.quote(inside)}"]
    return ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-ec", "\n".join(script)]


def container_environment(image: Image, **variables: str) -> dict[str, str]:
    """Returns the environment of a container."""
    return {**image.environment, "HOME": "/", "HOSTNAME": os.uname().nodename, **variables}
