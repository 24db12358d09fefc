"""The committed generated code matches the protobuf files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def read_files(folder: Path) -> dict[str, str]:
    """Returns the text of each file below a folder, without what Python has cached there."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*.py*")
        if path.suffix != ".pyc"
    }


def test_the_generated_code_is_up_to_date(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate(tmp_path / "gen")
    assert read_files(tmp_path / "gen") == read_files(ROOT / "pomelo/gen"), "run make gen"
