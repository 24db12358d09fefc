"""The description against the thing described."""

import asyncio
import sys
from pathlib import Path

from door import KEY, Door

from gateway.fields import FIELDS
from gateway.openapi import document
from gateway.routes import ROUTES
from pomelo.errors import TABLE

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "ignored_auth",
)


def test_every_route_every_field_and_every_error_of_a_task_is_described() -> None:
    described = document("")
    paths = {(method.upper(), path) for path, ops in described["paths"].items() for method in ops}
    assert paths == {(r.method, r.path) for r in ROUTES if r.path != "/openapi.json"}
    answers = described["paths"]["/api/v1/task"]["post"]["responses"]
    told = {code for answer in answers.values() for code in answer["description"].split(", ")}
    assert told >= set(TABLE) - {"not_found", "method_not_allowed"}
    form = described["components"]["schemas"]["Form"]["properties"]
    assert set(form) == {"model", "stream", "audio"}.union(*FIELDS.values())


async def test_random_requests_get_only_what_the_description_promises(door: Door, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{door.url}/openapi.json",
        "--header",
        f"Authorization: Bearer {KEY}",
        "--checks",
        ",".join(CHECKS),
        "--max-examples=20",
        "--seed=1",
        "--no-color",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=tmp_path,
    )
    try:
        async with asyncio.timeout(120):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, out.decode()[-5000:]
