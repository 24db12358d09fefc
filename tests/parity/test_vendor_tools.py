"""Tools and JSON schemas with a live key, at each vendor of text: over every front end the same result, bill and error,
and for the same task the same of every vendor."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import open_app
from pomelo.testing import FaultUpstream
from tests.app import app_settings, endow
from tests.driver import STREAM, Outcome, TaskRequest
from tests.grpc_driver import GrpcDriver
from tests.parity.comparison import Driver, ask_all, assert_same
from tests.rest_driver import RestDriver

MODELS = ("gpt-4", "claude-3-sonnet", "mixtral-8x7b")
CITY = {
    "type": "object",
    "properties": {"z": {"type": "string"}, "a": {"type": "integer"}},
    "required": ["z", "a"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
ASKED = {"role": "user", "content": "How is the weather?", "name": "ann"}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"z": "Köln", "a": 1}'},
}
AGAIN = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"}
HISTORY = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]
LONGER = [
    *HISTORY,
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [AGAIN]},
    RESULT,
]


@dataclass(frozen=True)
class Served:
    """A server with keys for all vendors, a client of each front end, and a live key."""

    clients: dict[str, Driver]
    key: str

    async def ask(self, body: dict[str, Any], *, stream: bool) -> Outcome:
        """The outcome of a task, which is the same over all front ends."""
        request = TaskRequest(body, self.key, stream)
        outcomes = await ask_all(self.clients, request)
        assert_same(outcomes, request)
        return outcomes["rest"]


@pytest.fixture(name="served", scope="module")
async def _served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with FaultUpstream() as upstream, aiohttp.ClientSession() as session:
        folder = tmp_path_factory.mktemp("data")
        settings = app_settings(folder, upstream, anthropic_api_key="anthropic-upstream")
        async with open_app(settings) as app:
            assert app.rest is not None
            assert app.grpc is not None
            await endow(app.store)
            _, key = await app.keyring.create(live=True)
            async with grpc.aio.insecure_channel(app.grpc) as channel:
                rest = RestDriver(session, "http://{}:{}".format(*app.rest))
                yield Served({"rest": rest, "grpc": GrpcDriver(channel)}, key)


def schema(**changes: Any) -> dict[str, Any]:
    """An output format."""
    return {
        "type": "json_schema",
        "json_schema": {"name": "city", "strict": True, "schema": {**CITY, **changes}},
    }


TASKS: dict[str, dict[str, Any]] = {
    "a tool call": {"messages": [ASKED], "tools": TOOLS},
    "a chosen tool": {
        "messages": [ASKED],
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "now"}},
        "parallel_tool_calls": False,
    },
    "a required tool": {"messages": [ASKED], "tools": TOOLS, "tool_choice": "required", "temperature": 1},
    "no tool": {"messages": [ASKED], "tools": TOOLS, "tool_choice": "none"},
    "a result": {"messages": HISTORY, "tools": TOOLS},
    "ids used twice": {"messages": LONGER, "tools": TOOLS},
    "results without tools": {"messages": LONGER},
    "a JSON schema": {"messages": [ASKED], "response_format": schema()},
    "a JSON schema beside tools": {"messages": HISTORY, "response_format": schema(), "tools": TOOLS},
}


@STREAM
@pytest.mark.parametrize("name", TASKS)
async def test_tools_have_the_same_result_over_all_front_ends_and_of_every_vendor(
    name: str, stream: bool, served: Served
) -> None:
    results = []
    for model in MODELS:
        outcome = await served.ask({"model": model, **TASKS[name]}, stream=stream)
        assert (outcome.code, outcome.message) == ("ok", "")
        output = outcome.output
        # Vendors' ids differ, and so does the white space of what they generate.
        calls = [(called, json.loads(arguments)) for _, called, arguments in output.get("calls", ())]
        results.append((output["text"], output["finish"], calls))
    assert results[0] == results[1] == results[2]
    text, _, calls = results[0]
    assert bool(calls) == (name in ("a tool call", "a chosen tool", "a required tool"))
    if name.startswith("a JSON schema"):
        assert list(json.loads(text)) == ["z", "a"]


@STREAM
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"response_format": schema(additionalProperties=True)}, "response_format"),
        (
            {
                "tools": [
                    {**NOW, "function": {"name": "now", "strict": True, "parameters": {"type": "string"}}}
                ]
            },
            "tools",
        ),
    ],
)
async def test_a_schema_that_a_vendor_refuses_is_the_same_error_over_all_front_ends(
    model: str, wrong: dict[str, Any], field: str, stream: bool, served: Served
) -> None:
    outcome = await served.ask({"model": model, "messages": [ASKED], **wrong}, stream=stream)
    assert outcome.code == "invalid_parameter"
    assert outcome.message.startswith(f"Invalid {field}: ")
