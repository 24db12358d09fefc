"""Runs the blocks of docs/client.md in order, as one program; only the address and the key differ."""

from __future__ import annotations

import asyncio
import re
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

from pomelo.client import ApiError
from pomelo.errors import RETRY_AFTER, TABLE
from tests.serving import serve

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_names_existing_exceptions_alone() -> None:
    known = {each.__name__ for each in ApiError.__subclasses__()}
    assert set(re.findall(r"`([A-Z]\w+Exceeded)`", PAGE)) <= known


def test_the_page_names_the_errors_that_are_repeated() -> None:
    (sentence,) = re.findall(r"A call is retried if .*?\.", PAGE, re.DOTALL)
    assert sorted(re.findall(r"`(\w+)`", sentence)) == sorted(
        code
        for code, row in TABLE.items()
        if row.http in RETRY_AFTER and row.retry_after and not row.permanent
    )


async def test_the_blocks_run(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        program = "\n".join(BLOCKS).replace("YOUR_API_KEY", served.key)
        program = program.replace("127.0.0.1:50051", f"127.0.0.1:{served.grpc_port}")
        (tmp_path / "program.py").write_text(program)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "program.py", cwd=tmp_path, stdout=PIPE, stderr=PIPE
        )
        async with asyncio.timeout(60):
            out, error = await process.communicate()
    printed = out.decode()
    assert (process.returncode, error.decode()) == (0, ""), printed
    for expected in (
        "This is the Pomelo sandbox",
        "temperature 2",
        "True True",
        "Too slow",
        "Sunny, 21 °C in",
        "customer-17 {'project': 'alpha'}",
    ):
        assert expected in printed
    for name in ("kite.png", "morning.mp3", "evening.mp3", "downloaded.png"):
        assert (tmp_path / name).stat().st_size > 1000
