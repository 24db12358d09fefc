"""Runs the examples of the guides for callers, and compares what they print with what the guides show.

A block of bash, python or javascript is run; if a block of text follows, it is its output, in which … stands for
anything.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docs.blocks import blocks_of
from tests.integration.commands import output_of
from tests.serving import Served

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = ("streaming", "errors", "limits", "testing", "migrating")
COMMANDS = {
    "python": (sys.executable, "-c"),
    "javascript": ("node", "--input-type=module", "-e"),
    "bash": ("bash", "-o", "pipefail", "-c"),
}


class Example(NamedTuple):
    language: str
    code: str
    output: str


def examples(guide: str) -> list[Example]:
    """Returns the examples of a guide, in their order."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / f"{guide}.md").read_text(), re.DOTALL | re.MULTILINE)
    following = [*blocks[1:], ("", "")]
    return [
        Example(language, code, output if kind == "text" else "")
        for (language, code), (kind, output) in zip(blocks, following, strict=True)
        if language in COMMANDS
    ]


EXAMPLES = [
    pytest.param(example, id=f"{guide} {number} {example.language}")
    for guide in GUIDES
    for number, example in enumerate(examples(guide), 1)
]


def test_the_guides_have_examples_with_their_output() -> None:
    found = [example for guide in GUIDES for example in examples(guide)]
    assert len(found) >= 20
    assert {example.language for example in found} == set(COMMANDS)
    assert all(example.output for example in found)


CONFLICT = """
import threading

sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 20)
uuid.uuid4 = lambda: "of-an-earlier-attempt"
body = {"model": "gpt-4", "messages": [{"role": "user", "content": "[[delay:2]] Hi"}]}
headers = {"Authorization": f"Bearer {os.environ['KEY']}", "Idempotency-Key": uuid.uuid4()}
earlier = {"url": f"{os.environ['URL']}/api/v1/task", "json": body, "headers": headers}
threading.Thread(target=requests.post, kwargs=earlier).start()
sleep(0.5)
print(run_task(body)["object"])
"""


async def test_the_client_of_the_guide_waits_for_an_earlier_attempt(served: Served, tmp_path: Path) -> None:
    (client,) = [each.code for each in examples("errors") if "def run_task" in each.code]
    function, _, _ = client.partition("\nprint(")
    example = Example("python", function + CONFLICT, "task.completion")
    await test_an_example_prints_what_the_guide_shows(example, served, tmp_path)


@pytest.mark.parametrize("example", EXAMPLES)
async def test_an_example_prints_what_the_guide_shows(
    example: Example, served: Served, tmp_path: Path
) -> None:
    command = COMMANDS[example.language]
    if shutil.which(command[0]) is None or (example.language == "bash" and shutil.which("curl") is None):
        pytest.skip(f"{command[0]} or curl is not on this machine")
    variables = {**os.environ, "URL": served.url, "KEY": served.key}
    out = await output_of(*command, example.code, cwd=tmp_path, env=variables)
    printed = out.replace("\r\n", "\n").strip()
    shown = ".*".join(map(re.escape, example.output.strip().split("…")))
    assert re.fullmatch(shown, printed, re.DOTALL), printed


async def test_the_commands_of_the_sandbox_page(served: Served, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    commands = [block for block in blocks_of(DOCS / "sandbox.md") if "curl " in block.code]
    variables = {**os.environ, "URL": served.url, "KEY": served.key}
    printed = [  # some of them read the file that one before them has written
        await output_of(*COMMANDS["bash"], block.code, cwd=tmp_path, env=variables) for block in commands
    ]
    stream, calls, image, speech, changed, transcript, triggers = printed
    assert stream.endswith("data: [DONE]\n\n")
    assert stream.count("task.completion.chunk") > 200
    assert '"tool_calls"' in calls
    assert (image, speech, changed) == ("", "", "")
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "hello.mp3").read_bytes().startswith(b"ID3")
    assert (tmp_path / "again.ogg").read_bytes().startswith(b"OggS")
    assert '"text":"Hello there. How are you?"' in transcript
    assert "HTTP/1.1 429" in triggers
    assert "event: error" in triggers
    assert "HTTP/1.1 503" in triggers
