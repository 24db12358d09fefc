"""The pages on deployment and troubleshooting: every error code, and commands that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pomelo.errors import NOT_UNDER_API, TABLE, ErrorRow
from pomelo.settings import Settings
from tests.docs.blocks import BLOCKS as BLOCKS_OF_ALL
from tests.docs.blocks import check_pomelo

ROOT = Path(__file__).parents[2]
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text()
PAGES = DEPLOYMENT + TROUBLESHOOTING
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
BLOCKS = [re.sub(r"(?m)^ +(?=\w)", "", block) for block in re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL)]
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", TROUBLESHOOTING, re.DOTALL | re.MULTILINE))


def commands() -> set[str]:
    """Returns the commands of Pomelo in both pages, in blocks and in the text."""
    inline = re.findall(r"`(pomelo [a-z][^`]*)`", re.sub(r"```.*?```", "", PAGES, flags=re.DOTALL))
    in_blocks = re.findall(r"(?m)(?:^| -- | pomelo(?:-1)? |/bin/)(pomelo [a-z].*)$", "\n".join(BLOCKS))
    return {" ".join(command.split()) for command in (*inline, *in_blocks)}


def test_every_error_code_has_a_section() -> None:
    assert set(SECTIONS) == set(TABLE)


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.code)
def test_a_section_has_the_status_of_the_code_and_a_cause_or_a_remedy(row: ErrorRow) -> None:
    section = SECTIONS[row.code]
    (seen,) = re.findall(r"\* \*\*Callers see\*\* (.*?)(?=^\*)", section, re.DOTALL | re.MULTILINE)
    assert row.code in NOT_UNDER_API or str(row.http) in seen
    assert row.status in seen or "never over gRPC" in seen
    assert ("Retry-After" in seen) == (row.retry_after is not None and not row.permanent)
    assert re.search(r"^\* \*\*(Causes|Remedy)\.\*\*|Causes as for", section, re.MULTILINE)


def test_metrics_that_the_pages_name_exist() -> None:
    reference = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`(pomelo_\w+)`", PAGES + (ROOT / "docs" / "operations.md").read_text()))
    assert len(named) > 10
    assert {name for name in named if f"`{name}`" not in reference} == set()


def test_the_pages_name_many_commands() -> None:
    assert len(commands()) > 15
    assert "pomelo accounts list" in commands()


@pytest.mark.parametrize("text", sorted(commands()))
def test_a_command_exists_with_its_options(text: str) -> None:
    check_pomelo(text)


@pytest.mark.parametrize(
    ("capacity", "scenario", "system"),
    [
        ("short tasks over REST, SQLite", "REST, 32 connections", "Pomelo, SQLite"),
        ("short tasks over REST, Redis", "REST, 32 connections", "Pomelo, Redis"),
        ("short tasks over gRPC, SQLite", "gRPC, 32 calls", "Pomelo, SQLite"),
        ("text to speech, 64 KB", "Text to speech, raw, 64 KB", "Pomelo, SQLite"),
        ("uploads of 5 MB", "Upload of 5 MB", "Pomelo, SQLite"),
    ],
)
def test_the_capacity_is_what_the_benchmarks_measured(capacity: str, scenario: str, system: str) -> None:
    (shown,) = re.findall(rf"^\| {re.escape(capacity)} \| ([\d,]+) a second \|", DEPLOYMENT, re.MULTILINE)
    table = BENCHMARKS.partition("## Results")[2].partition(f"\n| {scenario} |")[2].partition("\n\n")[0]
    (measured,) = re.findall(rf"^\| {re.escape(system)} \| ([\d,]+) \|", table, re.MULTILINE)
    figure = int(measured.replace(",", ""))
    assert int(shown.replace(",", "")) == round(figure, 2 - len(str(figure)))


def test_files_that_the_blocks_name_exist() -> None:
    named = set(re.findall(r"deploy/[\w./-]+", "\n".join(BLOCKS)))
    assert len(named) > 5
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_preparation_of_compose_works(folder: Path) -> None:
    (block,) = [block for block in BLOCKS if "example.env" in block]
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    subprocess.run(["bash", "-ec", block], cwd=folder, check=True, capture_output=True)
    assert (folder / "deploy" / ".env").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in (folder / "deploy" / "tls").iterdir()} == {"tls.crt", "tls.key"}


def test_the_rolling_restart_takes_each_server_out_and_puts_it_back(folder: Path) -> None:
    (block,) = [block for block in BLOCKS if "sed --in-place" in block]
    (folder / "compose").mkdir()
    file = folder / "compose" / "upstreams.conf"
    before = (ROOT / "deploy" / "compose" / "upstreams.conf").read_text()
    file.write_text(before)
    # Instead of Docker: what is down at each step. No server needs a pause.
    stub = 'docker() { echo "$*: $(grep -c " down " compose/upstreams.conf)"; }; sleep() { :; }\n'
    printed = subprocess.run(
        ["bash", "-ec", stub + block], cwd=folder, check=True, capture_output=True, text=True
    )
    down = [int(line.rpartition(": ")[2]) for line in printed.stdout.splitlines()]
    assert down == [0, 2, 2, 0, 2, 2, 0], "a line each of REST and gRPC"
    assert file.read_text() == before


def test_the_commands_for_accounts_keys_and_usage_run_in_their_order(folder: Path) -> None:
    pages = ("accounts.md", "usage.md")
    blocks = [block for page in pages for block in BLOCKS_OF_ALL if block.page == page]
    nouns = ("pomelo accounts", "pomelo keys", "pomelo usage", "pomelo log")
    found = [command for block in blocks for command in block.commands if command.startswith(nouns)]
    expected = [command for command in found if "$KEY_ID" not in command]  # that one is run with a server
    assert len(expected) > 20
    # One process, because each would import all anew.
    script = """
import contextlib, io, json, shlex, sys
from pomelo.cli.commands import program

def run(text):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        program()(shlex.split(text)[1:], standalone_mode=False)
    return output.getvalue()

for command in json.loads(sys.argv[1]):
    if "KEY_ID" in command:
        ids = [key["id"] for key in json.loads(run("pomelo keys list acme --json")) if not key.get("revoked")]
        command = command.replace("KEY_ID", ids[0])
    run(command)
print(run("pomelo accounts show acme --json"))
"""
    settings = Settings(data=folder / "data")
    settings.root_secret()
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(expected)],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "POMELO_DATA": str(folder / "data")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "Nothing has failed" in done.stderr
    account = json.loads(done.stdout)
    granted = account["live"]["granted"], account["test"]["granted"]
    assert granted == (132.5, 200), "10 + 25 - 22.5 + 120, and 100 + 100"
