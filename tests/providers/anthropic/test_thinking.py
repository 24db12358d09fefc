"""Reasoning at Anthropic: the effort, the thinking, and what excludes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog
from pomelo.gen.v1.text_pb2 import ReasoningEffort, ToolChoice
from tests.providers.rig import Rig, read_all
from tests.providers.text_rig import ANTHROPIC, TIME, adjusted, hi, tools_input

NONE = ReasoningEffort.REASONING_EFFORT_NONE
MINIMAL = ReasoningEffort.REASONING_EFFORT_MINIMAL
LOW = ReasoningEffort.REASONING_EFFORT_LOW
MAX = ReasoningEffort.REASONING_EFFORT_MAX
OPUS = Catalog.load().models["claude-3-opus"].routes[0]
HAIKU = Catalog.load().models["claude-3-haiku"].routes[0]


@pytest.mark.parametrize(
    ("effort", "config", "thinking", "reported"),
    [
        (0, None, None, []),
        (NONE, None, {"type": "disabled"}, []),
        (MINIMAL, None, {"type": "disabled"}, ["reasoning_effort=none"]),
        (LOW, {"effort": "low"}, {"type": "adaptive"}, []),
        (
            ReasoningEffort.REASONING_EFFORT_XHIGH,
            {"effort": "high"},
            {"type": "adaptive"},
            ["reasoning_effort=high"],
        ),
        (MAX, {"effort": "max"}, {"type": "adaptive"}, []),
    ],
)
async def test_an_effort_makes_the_model_think(
    rig: Rig, effort: Any, config: Any, thinking: Any, reported: list[str], stream: bool
) -> None:
    job = ANTHROPIC.job(hi(reasoning_effort=effort), stream=stream, route=OPUS)
    await read_all(rig.provider, job)
    body = rig.requests[0].body
    assert (body.get("output_config"), body.get("thinking")) == (config, thinking)
    assert adjusted(rig, job) == reported


async def test_a_route_without_efforts_gets_the_lowest_of_the_vendor(rig: Rig) -> None:
    job = ANTHROPIC.job(hi(reasoning_effort=MINIMAL), stream=False, route=replace(OPUS, efforts=()))
    await read_all(rig.provider, job)
    assert rig.requests[0].body["output_config"] == {"effort": "low"}
    assert adjusted(rig, job) == ["reasoning_effort=low"]


async def test_a_model_that_can_not_think_gets_no_effort(rig: Rig) -> None:
    for effort, reported in ((MAX, ["reasoning_effort=none"]), (NONE, [])):
        job = ANTHROPIC.job(hi(reasoning_effort=effort, temperature=1), stream=False, route=HAIKU)
        await read_all(rig.provider, job)
        body = rig.requests[-1].body
        assert body.keys() == {"model", "max_tokens", "messages", "temperature"}
        assert adjusted(rig, job) == reported


async def test_sampling_is_left_out_while_the_model_thinks(rig: Rig) -> None:
    job = ANTHROPIC.job(hi(reasoning_effort=LOW, temperature=1, top_p=1), stream=False, route=OPUS)
    await read_all(rig.provider, job)
    assert rig.requests[0].body.keys().isdisjoint(("temperature", "top_p"))
    assert adjusted(rig, job) == ["temperature", "top_p"]


async def test_the_model_thinks_after_tool_calls_whose_thoughts_the_caller_lacks(
    rig: Rig, stream: bool
) -> None:
    """Adaptive thinking does not require them. A model that always thinks refuses to have it turned off."""
    job = ANTHROPIC.job(tools_input(reasoning_effort=LOW, temperature=1), stream=stream, route=OPUS)
    await read_all(rig.provider, job)
    body = rig.requests[0].body
    assert (body["output_config"], body["thinking"]) == ({"effort": "low"}, {"type": "adaptive"})
    assert adjusted(rig, job) == ["temperature"]


@pytest.mark.parametrize(
    "choice",
    [
        ToolChoice(mode=ToolChoice.MODE_AUTO),
        ToolChoice(mode=ToolChoice.MODE_NONE),
        ToolChoice(mode=ToolChoice.MODE_REQUIRED),
        ToolChoice(tool="time"),
    ],
    ids=["auto", "none", "required", "a tool"],
)
async def test_the_model_thinks_whatever_tool_it_must_call(
    rig: Rig, choice: ToolChoice, stream: bool
) -> None:
    task = hi(tools=[TIME], tool_choice=choice, reasoning_effort=LOW, temperature=1)
    job = ANTHROPIC.job(task, stream=stream, route=OPUS)
    await read_all(rig.provider, job)
    body = rig.requests[0].body
    assert (body["output_config"], body["thinking"]) == ({"effort": "low"}, {"type": "adaptive"})
    assert adjusted(rig, job) == ["temperature"]
