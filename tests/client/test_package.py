"""The package is light, and typed for its users."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pomelo.client import AsyncClient, Client

HEAVY = ("aiohttp", "av", "gateway", "jiter", "pydantic", "redis", "sqlite3", "typer", "uvloop", "yarl")

PROGRAM = """\
from __future__ import annotations

from collections.abc import Iterator
from tempfile import SpooledTemporaryFile

from pomelo.client import (
    AsyncClient, Client, JsonSchema, Message, MessageDict, RateLimitExceeded, Tool, arguments, tool_result, user
)

weather = Tool("weather", "The weather of a place", {"type": "object"})


def run(client: Client) -> Iterator[str]:
    result = client.text("gpt-4", [user("Hi")], max_tokens=5, tools=[weather], format=JsonSchema({}), timeout=3)
    yield result.text
    messages: list[Message] = [user("Hi"), result.message, *[tool_result(call, "warm") for call in result.tool_calls]]
    print(arguments(result.tool_calls[0]), result.usage.input_tokens, result.limits.requests, result.cost)
    with client.stream("gpt-4", messages, temperature=0.5) as stream:
        yield from stream
        yield stream.result.finish_reason
    with client.stream_speech("eleven-labs-tts", "Hi", voice="adam") as speech:
        data: bytes = b"".join(speech)
    print(client.transcribe("eleven-labs-stt", data).language)
    mixed: list[Message | MessageDict] = [user("Hi"), result.message, {"role": "user", "content": "And?"}]
    yield client.text("gpt-4", mixed).text
    with SpooledTemporaryFile() as file:
        yield client.download(client.upload(file), file).id
    for record in client.usage(model="gpt-4"):
        yield record.id


async def main() -> None:
    async with AsyncClient("localhost:1", key="k") as client:
        result = await client.text("gpt-4", "Hi", user="me", metadata={"a": "b"}, reasoning_effort="low")
        text: str = result.text
        async with client.stream_image("flux-1-pro", text) as stream:
            progress: list[float] = [piece async for piece in stream]
        print(progress, stream.result.data)
        try:
            print([model.id async for model in client.models()])
        except RateLimitExceeded as error:
            print(error.retry_after, error.limits.requests)
"""

MISTAKES = [
    'client.text("gpt-4", "Hi", max_token=5)',
    'client.text("gpt-4", "Hi", max_tokens="5")',
    'client.text("gpt-4", "Hi", timeout="soon")',
    'client.text("gpt-4", [{"role": "robot", "content": "Hi"}])',
    'client.text("gpt-4", "Hi", tool_choice="maybe")',
    'client.speech("eleven-labs-tts", "Hi")',
    'client.image("flux-1-pro", "Hi").text',
    'client.stream("gpt-4", "Hi").text',
]


def test_importing_the_client_does_not_load_the_server() -> None:
    code = "import sys, pomelo.client; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "grpc" in loaded
    assert not set(HEAVY) & set(loaded)
    allowed = ("pomelo.client", "pomelo.gen", "pomelo.errors", "pomelo.output_file", "pomelo.status")
    assert [name for name in loaded if name.startswith("pomelo.") and not name.startswith(allowed)] == []


def check(tmp_path: Path, program: str) -> str:
    """Returns what mypy finds in a program of a user, with its strict options."""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", "program.py"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=270).stdout


def test_a_program_passes_mypy_with_strict_options(tmp_path: Path) -> None:
    assert check(tmp_path, PROGRAM) == ""
    body = "\n".join(f"    {mistake}" for mistake in MISTAKES)
    found = check(
        tmp_path, f"from pomelo.client import Client\n\n\ndef run(client: Client) -> None:\n{body}\n"
    )
    lines = [int(line.split(":")[1]) for line in found.splitlines() if ": error: " in line]
    assert sorted(set(lines)) == list(range(5, 5 + len(MISTAKES))), found


@pytest.mark.parametrize("client", [AsyncClient, Client])
def test_the_methods_describe_their_arguments(client: type) -> None:
    for name in ("text", "stream", "image", "speech", "transcribe"):
        method = getattr(client, name)
        assert list(inspect.signature(method).parameters)[:2] == ["self", "model"]
        assert list(inspect.signature(method).parameters)[-1] == "settings"
        assert "arguments" in method.__doc__


def test_both_clients_have_the_same_methods() -> None:
    def public(client: type) -> dict[str, object]:
        return {
            name: inspect.signature(member).parameters
            for name, member in vars(client).items()
            if not name.startswith("_") and callable(member)
        }

    assert public(AsyncClient) == public(Client)
