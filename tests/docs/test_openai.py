"""Runs the examples of docs/openai.md, with only the host and the key replaced, and compares its tables with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pomelo.catalog.catalog import Catalog
from tests import node_client
from tests.docs.test_examples import run
from tests.serving import serve

PAGE = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()
BLOCKS = dict(re.findall(r"```(bash|python|javascript)\n(.*?)```", PAGE, re.DOTALL))


async def test_the_examples_get_a_text(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    packages = Path(__file__).parents[1] / "sdk" / "js"
    modules = node_client.install(Path(request.config.cache.mkdir("node")), packages)
    (tmp_path / "node_modules").symlink_to(modules)
    async with serve(tmp_path) as served:
        for language, code in BLOCKS.items():
            code = code.replace("https://your-domain.com", served.url).replace("YOUR_API_KEY", served.key)
            assert "sandbox" in await run(language, code, tmp_path)


def test_the_page_lists_the_aliases_of_all_models() -> None:
    table = PAGE.partition("| model | alias |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\w.-]+) \| (.+) \|$", table, re.MULTILINE)
    listed = {model: tuple(re.findall(r"`([^`]+)`", aliases)) for model, aliases in rows}
    assert listed == {name: model.aliases for name, model in Catalog.load().models.items() if model.aliases}
