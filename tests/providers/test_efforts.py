"""Reasoning efforts, and other fields of requests whose values each vendor names in its own way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.gen.v1.text_pb2 import JsonSchema, ReasoningEffort, TextFormat, TextInput, ToolChoice
from pomelo.providers.anthropic.request import encode_request
from pomelo.providers.base import Job, fit_job
from pomelo.providers.chat.chat import Profile, request
from pomelo.providers.http.client import Timeouts
from pomelo.providers.text.input_texts import LONG_INPUT_BYTES
from pomelo.testing import Answer, FaultUpstream
from tests.providers.rig import base_url, open_provider, read_all
from tests.providers.text_rig import ANTHROPIC, COMPATIBLE, OPENAI, TIME, USER, Vendor, failure, hi, text

NONE = ReasoningEffort.REASONING_EFFORT_NONE
LOW = ReasoningEffort.REASONING_EFFORT_LOW
NAMES = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def effort(name: str) -> ReasoningEffort.ValueType:
    """The effort of this name."""
    return ReasoningEffort.Value(f"REASONING_EFFORT_{name.upper()}")


async def fitted(vendor: Vendor, task: TextInput, **options: Any) -> tuple[Job[Any], list[str]]:
    """A job on a route with these options as the vendor's provider fits it, and what is reported."""
    route = Route(vendor.name, "m", options=options)
    async with open_provider(vendor.make, "http://acme.example") as provider:
        job: Job[Any] = fit_job(vendor.job(task, stream=False, route=route, user=USER), provider.fit_text)
    return job, [f"{one.field}={one.used}" if one.used else one.field for one in job.adjustments]


@pytest.mark.parametrize("name", NAMES)
def test_an_effort_has_its_name_in_chat_completions(name: str) -> None:
    job = COMPATIBLE.job(hi(reasoning_effort=effort(name)), stream=False)
    assert request(job, Profile("acme"))["reasoning_effort"] == name


@pytest.mark.parametrize("name", NAMES[2:])
def test_an_effort_has_its_name_at_anthropic(name: str) -> None:
    route = Route("anthropic", "m", options={"thinking": "adaptive"})
    job = ANTHROPIC.job(hi(reasoning_effort=effort(name)), stream=False, route=route)
    body = json.loads(encode_request(job, stream=False))
    assert (body["output_config"], body["thinking"]) == ({"effort": name}, {"type": "adaptive"})


@pytest.mark.parametrize("vendor", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
@pytest.mark.parametrize("name", ["none", "low"])
async def test_a_stream_of_a_model_that_was_asked_to_think_is_known(
    upstream: FaultUpstream, vendor: Vendor, name: str
) -> None:
    upstream.default = vendor.protocol.Answer("one")
    route = Route(vendor.name, "m", options={"thinking": "adaptive"} if vendor is ANTHROPIC else {})
    job = vendor.job(hi(reasoning_effort=effort(name)), stream=True, route=route)
    async with open_provider(vendor.make, base_url(upstream, vendor.server)) as provider:
        assert text(await read_all(provider, job)) == "one"
    assert job.report.thinks == (name != "none")


def test_an_effort_of_none_turns_the_thinking_off() -> None:
    route = Route("anthropic", "m", options={"thinking": "adaptive"})
    job = ANTHROPIC.job(hi(reasoning_effort=NONE), stream=False, route=route)
    body = json.loads(encode_request(job, stream=False))
    assert body["thinking"] == {"type": "disabled"}
    assert "output_config" not in body


@pytest.mark.parametrize(
    ("excludes", "reported"),
    [
        (["temperature"], ["temperature"]),
        (["temperature", "top_p"], ["temperature", "top_p"]),
        (["tools", "temperature"], ["reasoning_effort=none"]),
    ],
)
async def test_only_what_a_route_names_excludes_reasoning(excludes: list[str], reported: list[str]) -> None:
    task = hi(reasoning_effort=LOW, temperature=1, top_p=0.5, tools=[TIME])
    _, adjusted = await fitted(OPENAI, task, reasoning_excludes=excludes)
    assert adjusted == reported


async def test_the_message_of_a_refusal_says_when_a_parameter_is_taken() -> None:
    messages: list[str] = []

    def fit(fitting: Any) -> None:
        provider.fit_text(fitting)
        messages.append(fitting.refusal().message)

    route = Route("openai", "m", options={"reasoning_excludes": ["temperature"]})
    async with open_provider(OPENAI.make, "http://acme.example") as provider:
        fit_job(OPENAI.job(hi(reasoning_effort=LOW, temperature=1), stream=False, route=route), fit)
    assert messages == ["Invalid temperature: must be left out unless reasoning_effort is none"]


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (ToolChoice.MODE_AUTO, "auto"),
        (ToolChoice.MODE_NONE, "none"),
        (ToolChoice.MODE_REQUIRED, "required"),
    ],
)
def test_a_choice_between_tools_has_its_name_in_chat_completions(mode: Any, name: str) -> None:
    job = COMPATIBLE.job(hi(tools=[TIME], tool_choice=ToolChoice(mode=mode)), stream=False)
    assert request(job, Profile("acme"))["tool_choice"] == name


@pytest.mark.parametrize("vendor", [COMPATIBLE, ANTHROPIC], ids=lambda vendor: vendor.name)
@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "late"),
    [("none", LONG_INPUT_BYTES - 100, False), ("low", 2, True), ("none", LONG_INPUT_BYTES, True)],
)
async def test_a_stream_may_begin_late_only_if_the_model_reasons_or_reads_long_or_the_host_is_slow(
    upstream: FaultUpstream, vendor: Vendor, patient: bool, name: str, size: int, late: bool
) -> None:
    waited: list[bool] = []
    async with open_provider(vendor.make, base_url(upstream, vendor.server)) as provider:
        provider.profile = Profile("acme", patient=patient)
        stream_events = provider._http.stream_events

        def record(*arguments: Any, patient: bool, **more: Any) -> Any:
            waited.append(patient)
            return stream_events(*arguments, patient=patient, **more)

        provider._http.stream_events = record
        route = Route(vendor.name, "m", options={"thinking": "adaptive"})
        task = hi("x" * size, reasoning_effort=effort(name))
        await read_all(provider, vendor.job(task, stream=True, route=route))
    assert waited == [late or (patient and vendor is COMPATIBLE)]


@pytest.mark.parametrize(
    ("name", "silent_before", "code"),
    [("low", 0, ""), ("low", 1, "deadline_exceeded"), ("none", 0, "deadline_exceeded")],
)
async def test_a_model_that_reasons_may_be_silent_until_its_first_word(
    upstream: FaultUpstream, name: str, silent_before: int, code: str
) -> None:
    # The role has been sent before.
    upstream.script(Answer("one two", at={silent_before: 0.4}))
    timeouts = Timeouts(silence=0.1, whole=20)
    job = COMPATIBLE.job(hi(reasoning_effort=effort(name)), stream=True)
    async with open_provider(COMPATIBLE.make, base_url(upstream, "openai"), timeouts=timeouts) as provider:
        if code:
            assert (await failure(provider, job))[0].code == code
        else:
            assert text(await read_all(provider, job)) == "one two"


COMMON = {
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "response_format": "response_format",
    "reasoning_effort": "reasoning_effort",
    "user": "user",
}
FIXED = [
    *(
        (COMPATIBLE, ours, theirs)
        for ours, theirs in {
            **COMMON,
            "seed": "seed",
            "presence_penalty": "presence_penalty",
            "frequency_penalty": "frequency_penalty",
            "parallel_tool_calls": "parallel_tool_calls",
        }.items()
    ),
    *(
        (ANTHROPIC, ours, theirs)
        for ours, theirs in {
            **COMMON,
            "stop": "stop_sequences",
            "response_format": "output_config",
            "reasoning_effort": "output_config",
            "user": "metadata",
        }.items()
    ),
]


@pytest.mark.parametrize(("vendor", "ours", "theirs"), FIXED)
async def test_a_field_that_the_operator_fixes_is_reported_by_its_own_name(
    vendor: Vendor, ours: str, theirs: str
) -> None:
    task = hi(
        max_tokens=9,
        temperature=0.5,
        top_p=0.5,
        stop=["END"],
        seed=1,
        presence_penalty=1,
        frequency_penalty=1,
        tools=[TIME],
        tool_choice=ToolChoice(tool="time"),
        parallel_tool_calls=True,
        format=TextFormat(json_schema=JsonSchema(name="n", schema_json=json.dumps(OPEN))),
        reasoning_effort=LOW,
    )
    sampling = {"sampling": "both"} if vendor is ANTHROPIC else {}
    _, before = await fitted(vendor, task, **sampling)
    _, adjusted = await fitted(vendor, task, **sampling, extra={theirs: {}})
    assert ours not in before
    assert ours in adjusted


async def test_max_tokens_bound_what_a_task_costs_and_are_not_fixed() -> None:
    job, adjusted = await fitted(COMPATIBLE, hi(max_tokens=9), extra={"max_tokens": 4_000})
    assert (job.input.max_tokens, adjusted) == (9, [])
    assert request(job, Profile("acme"))["max_tokens"] == 9


CLOSED = {"type": "object", "properties": {"a": {}}, "additionalProperties": False}
OPEN = {"type": "object", "properties": {"a": {}}}


@pytest.mark.parametrize("name", ["anyOf", "allOf", "oneOf", "prefixItems"])
async def test_every_object_within_a_schema_is_closed(name: str) -> None:
    given = {
        "type": "object",
        "properties": {"x": {name: [OPEN]}, "y": {"items": OPEN}},
        "definitions": {"d": OPEN},
    }
    schema = JsonSchema(name="n", schema_json=json.dumps(given))
    job, reported = await fitted(ANTHROPIC, hi(format=TextFormat(json_schema=schema)))
    body = json.loads(encode_request(job, stream=False))
    assert reported == []
    assert body["output_config"]["format"]["schema"] == {
        "type": "object",
        "properties": {"x": {name: [CLOSED]}, "y": {"items": CLOSED}},
        "definitions": {"d": CLOSED},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "bound",
    [
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "maxItems",
        "uniqueItems",
        "minProperties",
        "maxProperties",
    ],
)
async def test_a_bound_is_left_out_of_a_schema_that_is_not_strict(bound: str) -> None:
    given = {"type": "object", "properties": {"x": {"type": "array", bound: 1, "minItems": 1}}}
    schema = JsonSchema(name="n", schema_json=json.dumps(given))
    job, _ = await fitted(ANTHROPIC, hi(format=TextFormat(json_schema=schema)))
    body = json.loads(encode_request(job, stream=False))
    sent = body["output_config"]["format"]["schema"]["properties"]["x"]
    assert sent == {"type": "array", "minItems": 1}
