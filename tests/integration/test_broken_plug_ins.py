"""A plug-in that can't be used costs its own models alone: the server starts, and says which one and why."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.integration.commands import live_key, pomelo
from tests.serving import Served, serve
from tests.tasks import text_body
from tests.waiting import until

CATALOGUE = """
[models.{name}-model]
type = "text"
limits = {{ max_input_tokens = 1000, max_output_tokens = 100 }}
price = {{ million_input_tokens = "1", million_output_tokens = "1" }}
price_version = "2026-11-26"
[[models.{name}-model.routes]]
provider = "{name}"
model = "{model}"
"""
WORKING = """
from pathlib import Path
class P:
    catalog = {catalog}
    configured = False
    def __init__(self, credentials, http): pass
    async def aclose(self): pass
"""
MODULES = {
    "absent": "Other = 1",
    "raising": "raise RuntimeError('at import')",
    "exiting": "import sys; sys.exit(3)",
    "misdeclared": "class P:\n    base_url = 5",
    "failing": "class P:\n    def __init__(self, credentials, http): raise KeyError(credentials.api_key)",
    "shapeless": "class P:\n    def __init__(self, credentials, http): pass",
    "uncatalogued": WORKING.format(catalog="'/nowhere/catalog.toml'"),
    "misrowed": WORKING.format(catalog="Path(__file__).with_name('misrowed.toml')"),
    "late": WORKING.format(catalog="Path(__file__).with_name('late.toml')"),
    "stuck": """
import asyncio
class P:
    configured = True
    def __init__(self, credentials, http): pass
    async def aclose(self):
        while True:
            try: await asyncio.sleep(3600)
            except asyncio.CancelledError: pass
""",
}
"""What is wrong with a plug-in, and its module. `late` works until a test writes its catalogue, `stuck` until it
is closed."""

KEY = "key-of-the-operator"


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a server with all these plug-ins, and with models for them in its own catalogue."""
    site = tmp_path_factory.mktemp("site")
    own = site / "catalog.toml"
    own.write_text("".join(CATALOGUE.format(name=name, model="m") for name in MODULES if name != "misrowed"))
    (site / "late.toml").write_text("")
    (site / "misrowed.toml").write_text(
        CATALOGUE.format(name="misrowed", model="m").replace('"2026', '"x\\u0007')
    )
    for name, code in MODULES.items():
        (site / f"plug_in_{name}.py").write_text(code)
        metadata = site / f"plug_in_{name}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plug-in-{name}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[pomelo.providers]\n{name} = plug_in_{name}:P\n")
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    keys = {f"{name.upper()}_API_KEY": KEY for name in MODULES}
    return {"PYTHONPATH": path, "POMELO_CATALOG": str(own), **keys}


@pytest.fixture(scope="module")
async def served(
    variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    async with serve(tmp_path_factory.mktemp("served"), **variables) as process:
        yield process


async def post(http: aiohttp.ClientSession, served: Served, key: str, model: str) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}"}
    async with http.post(f"{served.url}/api/v1/task", json=text_body("Hi", model), headers=headers) as answer:
        body = await answer.json()
        return answer.status, body.get("error", {}).get("code", "")


async def test_its_models_answer_that_it_is_not_configured_and_its_name_is_logged(
    served: Served, variables: dict[str, str], http: aiohttp.ClientSession
) -> None:
    live = await live_key(served.data.parent, **variables)
    for name in MODULES:
        if name in ("misrowed", "late", "stuck"):
            continue
        assert await post(http, served, live, f"{name}-model") == (503, "provider_not_configured")
        assert await post(http, served, served.key, f"{name}-model") == (200, "")  # the sandbox answers
        (line,) = [line for line in served.log().splitlines() if re.search(rf"plug-in.*\b{name}\b", line)]
        assert "A plug-in can't be used, and its models are not available" in line
    assert await post(http, served, served.key, "gpt-4") == (200, "")


async def test_a_plug_in_with_a_wrong_catalogue_has_no_models(
    served: Served, http: aiohttp.ClientSession
) -> None:
    assert await post(http, served, served.key, "misrowed-model") == (400, "unsupported_model")
    assert "the plug-in misrowed: " in served.log()


async def test_neither_a_key_nor_a_traceback_is_logged(served: Served) -> None:
    assert KEY not in served.log()
    assert "Traceback" not in served.log()


async def test_they_do_not_prevent_a_reload_and_one_that_worked_goes_on(
    variables: dict[str, str], tmp_path: Path
) -> None:
    own, catalogue = tmp_path / "pomelo.toml", Path(variables["POMELO_CATALOG"]).with_name("late.toml")
    catalogue.write_text("")
    async with serve(tmp_path, **variables) as process:
        own.write_text('openai_base_url = "http://127.0.0.1:9/v1"\n')
        os.kill(process.pid, signal.SIGHUP)
        await until(lambda: "The configuration was reloaded: credentials added: openai" in process.log(), 30)
        catalogue.write_text(CATALOGUE.format(name="late", model="m").replace("2026", "\\u0007"))
        os.kill(process.pid, signal.SIGHUP)
        await until(lambda: "The configuration was not reloaded" in process.log(), 30)
    catalogue.write_text("")
    assert "the plug-in late: " in process.log()


async def test_doctor_and_the_check_before_a_start_name_each(
    served: Served, variables: dict[str, str]
) -> None:
    result = await pomelo(served.data.parent, "doctor", "--json", **variables)
    found = {finding["name"]: finding for finding in json.loads(result.out)}
    for name in MODULES:
        if name not in ("late", "stuck"):
            assert found[name]["state"] == "broken"
            assert found[name]["detail"].endswith("Its models are not available")
    assert result.status == 1
    checked = await pomelo(served.data.parent, "serve", "--check", **variables)
    for name in MODULES:
        assert bool(re.search(rf"\b{name}\b", checked.out)) == (name not in ("late", "stuck"))
    assert KEY not in result.out + result.error + checked.out + checked.error


async def test_a_plug_in_that_can_not_be_closed_does_not_outlive_the_server(
    variables: dict[str, str], tmp_path: Path
) -> None:
    async with serve(tmp_path, **variables) as process:
        pass  # it waits for the end, and kills what outlives SIGTERM
    assert "the provider stuck can't be closed: StillRunningError" in process.log()
