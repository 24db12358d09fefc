"""Responses to requests generated from the OpenAPI description, valid and invalid, conform to it.

By default 15 examples of an operation are tried, with CRASH=full 40.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.serving import Served, serve

SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))
CHECKS = ",".join(
    (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "missing_required_header",
        "unsupported_method",
        "ignored_auth",
    )
)
EXAMPLES = "40" if os.environ.get("CRASH") == "full" else "15"

# A generated X-Request-Timeout may end a call on a busy machine.
CONFIGURATION = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


@pytest.mark.timeout(330)
@pytest.mark.parametrize("paths", ["^/(api|media)/", "^/v1/(chat|responses|models)", "^/v1/(images|audio)/"])
async def test_every_response_conforms_to_the_description(tmp_path: Path, paths: str) -> None:
    # Each on a server of its own, which bounds the requests without a valid key that an address may send.
    async with serve(tmp_path) as served:
        await check_responses(served, tmp_path, paths)


async def check_responses(served: Served, folder: Path, paths: str) -> None:
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    options = ("--checks", CHECKS, "--max-examples", EXAMPLES, "--seed", "1", "--no-color")
    process = await asyncio.create_subprocess_exec(
        *(SCHEMATHESIS, "run", f"{served.url}/openapi.json", "-H", f"Authorization: Bearer {served.key}"),
        *("--include-path-regex", paths, *options),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(300):
        printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed[-6000:]
    cases = re.search(r"([\d,]+) generated", printed)
    assert cases is not None
    assert int(cases[1].replace(",", "")) >= 300
    assert "Traceback" not in served.log()
