"""Generates pomelo/gen from proto/ (`make gen`); a test compares the two.

protoc writes absolute imports of the proto packages (`pomelo.v1`), which are rewritten to the Python packages
(`pomelo.gen.v1`). The experimental functions that grpc adds to each service, which nothing calls and the type
stubs lack, are left out.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "pomelo" / "gen"
_IMPORT = re.compile(r"\bpomelo\.((?:\w+\.)*v\d+)(?= import|\.\w+_pb2)")
_EXPERIMENTAL = "\n\n # This class is part of an EXPERIMENTAL API."
"""The beginning of the end of a module with a service."""


def generate(target: Path) -> None:
    """Writes the generated packages, with their type stubs, into `target`, which it replaces.

    Raises:
        RuntimeError: protoc failed; its error is on stderr.
    """
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as scratch:
        options = [f"--{name}_out={scratch}" for name in ("python", "grpc_python", "mypy", "mypy_grpc")]
        # The plugins are in this Python's folder, which need not be on PATH.
        folder = Path(sys.executable).parent
        options += [
            f"--plugin=protoc-gen-{name}={folder / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")
        ]
        arguments = ["protoc", f"-I{ROOT / 'proto'}", f"-I{well_known}", *options, *protos]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc failed")
        shutil.rmtree(target, ignore_errors=True)
        generated = Path(scratch) / "pomelo"
        for folder in (generated, *(path for path in generated.rglob("*") if path.is_dir())):
            (folder / "__init__.py").touch()
        for source in sorted(generated.rglob("*.py*")):
            text = source.read_text()
            if "_pb2_grpc.py" in source.name and "Stub" not in text:
                continue  # a file without a service
            path = target / source.relative_to(generated)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_IMPORT.sub(r"pomelo.gen.\1", text.partition(_EXPERIMENTAL)[0]))


if __name__ == "__main__":
    generate(TARGET)
    sys.stdout.write(
        f"{TARGET.relative_to(ROOT)}: {sum(path.is_file() for path in TARGET.rglob('*'))} files\n"
    )
