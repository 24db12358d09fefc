"""Runs every block of docs/grpc.md; only the port of the server differs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import grpc
import pytest

from pomelo.client import Client
from pomelo.errors import TABLE
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.server.call_limits import CallLimits
from pomelo.server.server import ServerOptions
from tests import node_client
from tests.calls import bearer
from tests.integration.commands import output_of
from tests.protobuf.contract import ROOT, Contract
from tests.protobuf.test_python_stubs import generate
from tests.serving import Served

PAGE = (Path(__file__).parents[2] / "docs" / "grpc.md").read_text()
CALL = """
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const definition = loader.loadSync('pomelo/v1/task_service.proto', { includeDirs: [process.env.PROTO] });
const { TaskService } = grpc.loadPackageDefinition(definition).pomelo.v1;
const tasks = new TaskService('127.0.0.1:50051', grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set('authorization', `Bearer ${process.env.POMELO_KEY}`);
const text = { temperature: 3, messages: [{ role: 'ROLE_USER', content: [{ text: 'Hi' }] }] };
tasks.RunTask({ spec: { model: 'gpt-4', text } }, metadata, (error) => {
  console.log(JSON.stringify([errorInfo(error), errorInfo({ metadata: new grpc.Metadata() }) ?? null]));
  tasks.close();
});
"""
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [code for found, code in BLOCKS if found == language]


async def run(served: Served, folder: Path, *command: str, **variables: str) -> str:
    """Returns the output of a command whose last argument has the addresses of the page."""
    code = command[-1].replace("127.0.0.1:50051", f"127.0.0.1:{served.grpc_port}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "POMELO_KEY": served.key, **variables}
    return await output_of(*command[:-1], code, cwd=folder, env=environment)


def test_every_block_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "json", "python", "javascript"}


async def test_the_generic_client(served: Served, tmp_path: Path) -> None:
    (command,) = blocks("bash")
    answer = json.loads(await run(served, tmp_path, "bash", "-ec", command))
    assert "the Pomelo sandbox" in answer["result"]["text"]["message"]["content"][0]["text"]


async def test_the_blocks_for_python_with_generated_stubs(served: Served, tmp_path: Path) -> None:
    stubs = await asyncio.to_thread(generate, Contract(tmp_path))
    with Client(f"127.0.0.1:{served.grpc_port}", key=served.key) as client:
        (tmp_path / "kite.png").write_bytes(client.image("flux-1-pro", "A kite").data)
    program = "\n".join(blocks("python"))
    printed = await run(served, tmp_path, sys.executable, "-c", program, PYTHONPATH=str(stubs))
    assert printed.count("This is the Pomelo sandbox") == 2
    assert "INVALID_ARGUMENT INVALID_PARAMETER temperature" in printed
    assert "media_" in printed
    assert (tmp_path / "copy.png").read_bytes() == (tmp_path / "kite.png").read_bytes()


async def test_the_block_for_node_reads_the_reason_of_an_error(
    served: Served, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    modules = node_client.install(Path(request.config.cache.mkdir("node")))
    (code,) = blocks("javascript")
    variables = {"NODE_PATH": str(modules), "PROTO": str(ROOT / "proto")}
    info, absent = json.loads(await run(served, tmp_path, "node", "-e", code + CALL, **variables))
    assert (info["reason"], info["metadata"]["field"], absent) == ("INVALID_PARAMETER", "temperature", None)


async def test_the_retry_policy_is_accepted_and_names_every_status_that_a_retry_may_mend(
    served: Served,
) -> None:
    (text,) = blocks("json")
    (config,) = json.loads(text)["methodConfig"]
    assert set(config["retryPolicy"]["retryableStatusCodes"]) == {
        row.status for row in TABLE.values() if row.http in (409, 429, 503)
    }
    options = [("grpc.service_config", text)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}", options) as channel:
        assert (
            await ModelServiceStub(channel).ListModels(ListModelsRequest(), metadata=bearer(served.key))
        ).models
    with pytest.raises(Exception, match="service config"):
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{served.grpc_port}", [("grpc.service_config", text.replace("8s", "eight"))]
        ) as channel:
            await ModelServiceStub(channel).ListModels(ListModelsRequest(), metadata=bearer(served.key))


def test_the_page_has_the_servers_limits() -> None:
    limits, options = CallLimits(), ServerOptions()
    assert f"| a message to the server | {limits.message // 2**20} MiB |" in PAGE
    assert f"without a pause of {limits.chunk_time:.0f} s" in PAGE
    assert f"| concurrent calls on a connection | {options.connection_streams:,};" in PAGE
