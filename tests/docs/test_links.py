"""Links between pages, and pages that the code names, lead to existing files and headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SOURCES = sorted(
    path for folder in ("pomelo", "gateway", "tests", "bench") for path in ROOT.glob(f"{folder}/**/*.py")
)


def prose(page: Path) -> str:
    """Returns a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_project_that_a_page_names_exist(page: Path) -> None:
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tests_that_the_page_for_contributors_names_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    tests = "".join(source.read_text() for source in ROOT.glob("tests/**/test_*.py"))
    (name,) = re.findall(r"`(test_\w+)`", page)
    assert f"def {name}(" in tests
    ((file, word),) = re.findall(r"`pytest (\S+) -k (\w+)`", page)
    assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text())


def test_pages_that_sources_name_exist() -> None:
    named = {
        (str(source.relative_to(ROOT)), name)
        for source in SOURCES
        for name in re.findall(r"docs/[\w./-]+\.md", source.read_text())
    }
    assert len(named) > 5
    assert {(source, name) for source, name in named if not (ROOT / name).exists()} == set()
