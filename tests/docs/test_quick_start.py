"""Runs every block of docs/quick-start.md, and those of README.md, as they are; only the ports of the server differ."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import pytest

from tests import node_client
from tests.docs.blocks import blocks_of
from tests.integration.commands import output_of
from tests.protobuf.contract import ENVIRONMENT, ROOT
from tests.serving import Served

PAGE = (ROOT / "docs" / "quick-start.md").read_text()
SECTIONS = {
    title: re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
CURL = [code for _, code in SECTIONS["curl"]]
PYTHON = [code for title in ("Python", "Python with requests") for _, code in SECTIONS[title]]
README_BLOCKS = blocks_of(ROOT / "README.md")
(README,) = [block.code for block in README_BLOCKS if block.language == "python"]
(JAVASCRIPT,) = [code for _, code in SECTIONS["JavaScript"]]
GO = dict(SECTIONS["Go"])
(NODE,) = [code for _, code in SECTIONS["Node.js over gRPC"]]
(KEY,) = re.findall(r"^```bash\n(export .*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SANDBOX = "This is the Pomelo sandbox"

GO_SOURCES = Path("/usr/share/gocode")
DEBIANS_GO = {
    "grpc.NewClient(": "grpc.Dial(",
    "grpc.WithTransportCredentials(insecure.NewCredentials())": "grpc.WithInsecure()",
    '\t"google.golang.org/grpc/credentials/insecure"\n': "",
}
"""What Debian's gRPC for Go, which is older, has in place of what the page uses."""


@pytest.fixture(scope="module")
def folder(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the server was started."""
    folder = tmp_path_factory.mktemp("quick-start")
    (folder / ".pomelo").symlink_to(served.data)
    (folder / "proto").symlink_to(ROOT / "proto")
    return folder


def of(served: Served, code: str) -> str:
    """Returns a block with the addresses of the server."""
    return code.replace("127.0.0.1:8080", f"127.0.0.1:{served.port}").replace(
        "127.0.0.1:50051", f"127.0.0.1:{served.grpc_port}"
    )


async def run(served: Served, folder: Path, command: str, **variables: str) -> str:
    """Returns the output of a shell command, after the one that sets the key."""
    environment = {**os.environ, "POMELO_TARGET": f"127.0.0.1:{served.grpc_port}", **variables}
    return await output_of("bash", "-ec", KEY + command, cwd=folder, env=environment)


def needs(*commands: str) -> None:
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not on this machine")


async def test_the_blocks_for_curl(served: Served, folder: Path) -> None:
    needs("curl")
    whole, stream, image, speech, transcript = [await run(served, folder, of(served, code)) for code in CURL]
    assert SANDBOX in json.loads(whole)["choices"][0]["message"]["content"]
    assert stream.rstrip().endswith("data: [DONE]")
    assert (image, speech) == ("", "")
    assert (folder / "kite.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "hello.mp3").stat().st_size > 1000
    assert json.loads(transcript)["text"] == "Hello from Pomelo."


@pytest.mark.parametrize("number", range(len(PYTHON)))
async def test_the_blocks_for_python(number: int, served: Served, folder: Path) -> None:
    (folder / "program.py").write_text(of(served, PYTHON[number]))
    printed = await run(served, folder, f"{sys.executable} program.py")
    assert printed.count(SANDBOX) >= 2
    if "RateLimitExceeded" in PYTHON[number]:
        assert printed.splitlines()[-2:] == ["Hello.", "Retry after 60 s"]


async def test_the_program_of_the_readme(served: Served, folder: Path) -> None:
    (folder / "program.py").write_text(README.replace("pml_test_…", served.key))
    assert (await run(served, folder, f"{sys.executable} program.py")).startswith(SANDBOX)


async def test_the_commands_of_the_readme(served: Served, folder: Path) -> None:
    needs("curl")
    curl, buf = [block.code for block in README_BLOCKS if block.code.startswith(("curl ", "buf curl "))]
    (shown,) = [json.loads(block.code) for block in README_BLOCKS if block.language == "json"]
    answer = json.loads(await run(served, folder, of(served, curl)))
    assert shape(answer) == shape(shown)
    assert answer["usage"] == shown["usage"]
    assert answer["choices"][0]["message"]["content"].startswith(SANDBOX)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert SANDBOX in await run(served, folder, of(served, buf), PATH=path)


async def test_the_transcript_of_the_readme(served: Served, folder: Path) -> None:
    (transcript,) = [block.code for block in README_BLOCKS if block.language == "text"]
    greeting, *calls = re.split(r"^\$ (?=pomelo)", transcript, flags=re.MULTILINE)
    log = " ".join(served.log().split())
    for line in (
        "No provider has a key: test keys work, live keys need one, such as OPENAI_API_KEY",
        "Try it:",
    ):
        assert line in greeting
        assert line in log
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    address = f"127.0.0.1:{served.grpc_port}"
    for call in calls:
        command, _, output = call.partition("\n")
        printed = await run(served, folder, command, PATH=path, POMELO_GRPC=address)
        assert printed.split() == output.split()


def shape(value: Any) -> Any:
    """Returns the keys of an answer and the types of its values."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else type(value)


async def test_the_block_for_javascript(served: Served, folder: Path) -> None:
    needs("node")
    (folder / "program.mjs").write_text(of(served, JAVASCRIPT))
    assert (await run(served, folder, "node program.mjs")).startswith(SANDBOX)
    (folder / "program.mjs").write_text(of(served, JAVASCRIPT).replace("Why is", "[[cut]] Why is"))
    with pytest.raises(AssertionError, match="did not give a usable answer"):
        await run(served, folder, "node program.mjs")


async def test_leaving_the_loop_of_the_block_for_javascript_ends_the_task(
    served: Served, folder: Path
) -> None:
    needs("node")
    program = of(served, JAVASCRIPT).replace("Why is", "[[pace:600]] Why is")
    (folder / "program.mjs").write_text(
        program.replace("process.stdout.write(text);", "console.log(text); break;")
    )
    assert await run(served, folder, "node program.mjs") == "This\n"


async def test_the_reader_of_events_takes_any_stream(served: Served, folder: Path) -> None:
    needs("node")
    (reader,) = re.findall(r"^async function\* events.*?^}$", JAVASCRIPT, re.DOTALL | re.MULTILINE)
    (folder / "reader.mjs").write_text(
        reader
        + r"""
const text = '\uFEFF: a comment\ndata: {"a": "ü€😀"}\n\nevent: error\ndata:first\ndata:  second\nid: 7\n\n'
  + 'data\n\nevent: none\n\n: keep-alive\n\ndata: a: b\u2028c\n\ndata: [DONE]\n\ndata: not complete\n';
const found = new Set();
for (const end of ['\n', '\r\n', '\r']) {
  const bytes = new TextEncoder().encode(text.replaceAll('\n', end));
  for (const size of [1, 2, 3, 5, 1000]) {
    const body = new ReadableStream({ start(controller) {
      for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
      controller.close();
    } });
    const all = [];
    for await (const event of events(new Response(body))) all.push(event);
    found.add(JSON.stringify(all));
  }
}
console.log(JSON.stringify([...found]));
"""
    )
    (events,) = json.loads(await run(served, folder, "node reader.mjs"))
    assert json.loads(events) == [
        {"type": "message", "data": '{"a": "ü€😀"}'},
        {"type": "error", "data": "first\n second"},
        {"type": "message", "data": ""},
        {"type": "message", "data": "a: b\u2028c"},
        {"type": "message", "data": "[DONE]"},
    ]


async def test_the_block_for_node_over_grpc(
    served: Served, folder: Path, request: pytest.FixtureRequest
) -> None:
    modules = node_client.install(Path(request.config.cache.mkdir("node")))
    (folder / "program.cjs").write_text(of(served, NODE))
    printed = await run(served, folder, "node program.cjs", NODE_PATH=str(modules))
    assert printed.startswith(SANDBOX)
    assert re.search(r"\n\d+ tokens\n$", printed)


@pytest.mark.timeout(400)
async def test_the_blocks_for_go(served: Served, folder: Path, tmp_path: Path) -> None:
    needs("go", "protoc-gen-go", "protoc-gen-go-grpc")
    if not (GO_SOURCES / "src/google.golang.org/grpc").exists():
        pytest.skip(
            "golang-google-grpc-dev is not on this machine; on Debian as root `make generators` installs it"
        )
    module = tmp_path / "src" / "example.com" / "you"
    module.mkdir(parents=True)
    shutil.copytree(ROOT / "proto", module / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "go" / "codec.go", module)
    (module / "buf.gen.yaml").write_text(GO["yaml"])
    program = of(served, GO["go"])
    for new, old in DEBIANS_GO.items():
        assert new in program
        program = program.replace(new, old)
    (module / "main.go").write_text(program)
    variables = {
        "GO111MODULE": "off",
        "GOPATH": f"{tmp_path}:{GO_SOURCES}",
        "GOCACHE": str(tmp_path / "cache"),
    }
    build = await asyncio.create_subprocess_shell(
        f"buf generate && go build -o {folder}/ask .",
        cwd=module,
        env={**ENVIRONMENT, **variables},
        stderr=PIPE,
    )
    _, error = await build.communicate()
    assert build.returncode == 0, error.decode()
    printed = await run(served, folder, "./ask")
    assert printed.startswith(SANDBOX)
    assert re.search(r"\n\d+ tokens\n$", printed)
    with pytest.raises(AssertionError, match="INVALID_API_KEY: rpc error: code = Unauthenticated"):
        await run(served, folder, "POMELO_KEY=wrong ./ask")
