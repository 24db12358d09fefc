"""Responses to requests generated from the OpenAPI description, valid and invalid, conform to it."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from tests.serving import Served

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


async def test_every_response_conforms_to_the_description(served: Served, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(SCHEMATHESIS, "run", f"{served.url}/openapi.json", "-H", f"Authorization: Bearer {served.key}"),
        *("--checks", CHECKS, "--max-examples", "60", "--seed", "1", "--no-color"),
        cwd=tmp_path,
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
