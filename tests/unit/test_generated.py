"""The committed generated code matches the protobuf files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_generated_code_is_up_to_date(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    target = tmp_path / "v1"
    module.generate(target)
    generated = {path.name: path.read_text() for path in target.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "pomelo/gen/v1").iterdir() if path.is_file()}
    assert generated == committed, "run make gen"
