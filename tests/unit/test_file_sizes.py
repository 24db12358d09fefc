"""Every file has one subject: a long one has several."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 400


def test_no_python_file_is_longer_than_400_lines() -> None:
    files = [
        path
        for folder in ("pomelo", "gateway", "tests", "bench", "deploy")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "pomelo/gen")
    ]
    assert len(files) > 500
    counts = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {path: count for path, count in counts.items() if count > MAX_LINES} == {}
