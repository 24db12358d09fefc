"""Every fenced block of the documentation is run by the test of its page, or checked here, or left out for a reason."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from gateway.openapi.document import document
from pomelo.errors import TABLE
from pomelo.telemetry.metrics import Metrics
from tests.docs.blocks import BLOCKS, ROOT, Block, check_pomelo
from tests.sdk import published

RUN = {
    "README.md": ("tests/docs/test_quick_start.py", {"python", "json"}),
    "adding-a-provider.md": ("tests/docs/test_plugin.py", {"python"}),
    "alerts.md": ("tests/docs/test_alerts.py", {"python"}),
    "client.md": ("tests/docs/test_client_page.py", {"python"}),
    "errors.md": ("tests/docs/test_guides.py", {"bash", "python"}),
    "generated-clients.md": ("tests/generated/test_generated_clients.py", {"python", "typescript", "yaml"}),
    "grpc.md": ("tests/docs/test_grpc_page.py", {"bash", "python", "json", "javascript"}),
    "limits.md": ("tests/docs/test_guides.py", {"bash", "python"}),
    "migrating.md": ("tests/docs/test_guides.py", {"python"}),
    "openai-media.md": ("tests/docs/test_openai_media.py", {"bash", "python"}),
    "openai.md": ("tests/docs/test_openai.py", {"bash", "python", "javascript"}),
    "protobuf.md": ("tests/protobuf/test_generators.py", {"yaml"}),
    "provider-examples.md": ("tests/docs/test_provider_examples.py", {"python", "toml"}),
    "quick-start.md": ("tests/docs/test_quick_start.py", {"bash", "python", "javascript", "go", "yaml"}),
    "rest-api.md": ("tests/docs/test_examples.py", {"bash", "python", "javascript"}),
    "sandbox.md": ("tests/docs/test_guides.py", {"sh"}),
    "streaming.md": ("tests/docs/test_guides.py", {"bash", "python", "javascript"}),
    "testing.md": ("tests/docs/test_guides.py", {"bash", "python"}),
}
"""The test that runs all blocks of some languages on a page."""

ALSO_RUN = {
    "curl http://127.0.0.1:8080/api/v1/task": "tests/docs/test_quick_start.py",
    "buf curl --protocol grpc": "tests/docs/test_quick_start.py",
    "install -m 0600 example.env .env": "tests/docs/test_operators_pages.py",
    "for number in 1 2; do": "tests/docs/test_operators_pages.py",
    "systemctl daemon-reload": "tests/deploy/test_image_build.py",
    "npx openapi-typescript": "tests/generated/test_generated_clients.py",
    "openapi-python-client generate": "tests/generated/test_generated_clients.py",
    "python -m grpc_tools.protoc": "tests/protobuf/test_python_stubs.py",
    "pomelo accounts adjust acme -22.5": "tests/docs/test_operators_pages.py",
}
"""The tests that run single blocks, by a command of them."""

LEFT_OUT = {
    "docker": "there is no Docker where the tests run; the files it uses are tested in tests/deploy",
    "kubectl": "there is no cluster where the tests run; the manifests are tested in tests/deploy",
    "journalctl": "there is no systemd where the tests run",
    "systemd-run": "there is no systemd where the tests run; tests/deploy compares it with the unit",
    "nginx": "it changes the machine; tests/integration/test_nginx.py runs nginx with these files",
    "cp": "it changes the machine; tests/integration/test_nginx.py runs nginx with these files",
    "df": "it reports on the machine",
    "redis-cli": "it reports on the operator's Redis",
    "pip": "it would install from the package index",
    "npm": "the packages of a lock file are installed in its place",
    "export": "it sets what the other examples need",
    "curl": "it asks the operator's server, which tests/integration scrapes",
}
"""Why a command of a shell block is not run, by its first word."""

LANGUAGES = {"bash", "sh", "python", "javascript", "typescript", "go", "json", "toml", "yaml"}
OTHERS = {
    "text": "output, which the guides' tests compare, and drawings",
    "promql": "checked by its metrics",
    "dockerfile": "it needs Docker, and a package of the reader's",
}


def is_run(block: Block) -> bool:
    """Returns whether a test runs a block."""
    _, languages = RUN.get(block.page, ("", set()))
    if block.language in languages:
        return True
    if block.page in ("maintenance.md", "operations.md") and block.heading in operations_headings():
        return True
    return any(f"\n{command}" in f"\n{block.code}" for command in ALSO_RUN)


def operations_headings() -> set[str]:
    """Returns the headings of docs/maintenance.md and docs/operations.md whose blocks a test runs or compares."""
    return set(re.findall(r'blocks\("(#+ .+?)"\)', (ROOT / "tests/docs/test_operations.py").read_text()))


def check_command(text: str) -> None:
    """Asserts that a command of a shell block exists, or is one that is left out."""
    text = re.sub(r"^(\w+=\S+ +)+", "", text)
    words = text.split()
    if words[0] == "pomelo":
        if words[1:2] != [">"]:  # shell completion
            check_pomelo(re.split(r" [|>] ", text)[0])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, text
    elif words[0] == ".venv/bin/python":
        assert find_spec(words[2]), text
    else:
        assert words[0] in LEFT_OUT, f"no test runs: {text}"


def check_toml(code: str) -> None:
    tomllib.loads(code)


def check_yaml(code: str) -> None:
    import_module("yaml").safe_load(code)


def check_json(code: str) -> None:
    """Asserts that an example of an answer is valid by the API's description, or an error of the table."""
    example = json.loads(code)
    if error := example.get("error"):
        assert error["type"] == TABLE[error["code"]].type
        assert not published.errors("ErrorResponse", example)
    elif "object" in example:
        assert any(validator.is_valid(example) for validator in validators(example["object"]))


def validators(name: str) -> list[Any]:
    """Returns the validators of the answers that have this name in `object`."""
    schemas = document("")["components"]["schemas"]
    return [
        jsonschema_rs.validator_for(
            {"$ref": f"#/components/schemas/{key}", "components": {"schemas": schemas}}
        )
        for key, schema in schemas.items()
        if schema.get("properties", {}).get("object", {}).get("const") == name
    ]


def check_shell(block: Block) -> None:
    for command in block.commands:
        check_command(command)


def name_of(block: Any) -> str:
    return block.name if isinstance(block, Block) else ""


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_a_block_is_run_or_checked(block: Block) -> None:
    assert block.language in LANGUAGES | OTHERS.keys(), "a block needs a language; output is text"
    if block.language in OTHERS or is_run(block):
        return
    if block.language in ("bash", "sh"):
        check_shell(block)
    elif block.language == "toml":
        check_toml(block.code)
    elif block.language == "yaml":
        check_yaml(block.code)
    elif block.language == "json":
        check_json(block.code)
    else:
        raise AssertionError(f"no test runs this {block.language}")


def test_there_are_no_tests_of_blocks_that_are_gone() -> None:
    found = {(block.page, block.language) for block in BLOCKS}
    named = {(page, language) for page, (_, languages) in RUN.items() for language in languages}
    assert named - found == set()
    code = "".join(f"\n{block.code}" for block in BLOCKS)
    assert [command for command in ALSO_RUN if f"\n{command}" not in code] == []
    words = {command.split()[0] for block in BLOCKS for command in block.commands}
    assert LEFT_OUT.keys() <= words


@pytest.mark.parametrize(("page", "file"), [(page, file) for page, (file, _) in RUN.items()])
def test_the_test_of_a_page_reads_it(page: str, file: str) -> None:
    assert Path(page).stem in (ROOT / file).read_text()


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in ("bash", "sh")], ids=name_of
)
def test_a_shell_block_is_valid(block: Block) -> None:
    found = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_queries_use_metrics_that_are_reported() -> None:
    reported = {instrument.name for instrument in Metrics().instruments}
    queries = [block.code for block in BLOCKS if block.language == "promql"]
    named = {name for query in queries for name in re.findall(r"\b(pomelo_\w+)", query)}
    assert named
    assert named - reported == set()
