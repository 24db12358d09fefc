"""The log of `pomelo serve`: each failure of a vendor is found by the caller's request id, and no line has
content, a key, or text of a vendor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.testing import Answer, Reply, Script, Stop, bfl_protocol, elevenlabs_protocol, error_reply
from pomelo.testing.upstream import FaultUpstream
from tests.driver import Outcome, TaskRequest
from tests.grpc_driver import GrpcDriver
from tests.integration.commands import live_key
from tests.ports import free_port
from tests.rest_driver import RestDriver
from tests.serving import Served, serve
from tests.tasks import TASK_BODIES, text_body

PROMPT, VENDOR_KEY, VENDOR_TEXT = "canary-of-a-caller", "sk-canary-of-the-operator", "canary-of-a-vendor"
PROTOCOL = pytest.mark.parametrize("protocol", ["rest", "grpc"])


def refusal(status: int, code: str | None = None) -> Reply:
    """A refusal of OpenAI."""
    return error_reply(status, code=code, message=VENDOR_TEXT, headers={"x-request-id": f"req_{status}"})


@dataclass(frozen=True)
class Failure:
    """A vendor's reply, and what the log says about it; 0: nothing, because there was no response."""

    script: Script | None
    code: str
    upstream_status: int
    reason: str
    stream: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


FAILURES = {
    "bad-key": Failure(refusal(401, "invalid_api_key"), "provider_failed", 401, "refused your key"),
    "forbidden": Failure(refusal(403), "provider_failed", 403, "does not allow this to your key"),
    "model-gone": Failure(refusal(404, "model_not_found"), "provider_failed", 404, "not have the model"),
    "busy": Failure(refusal(429, "rate_limit_exceeded"), "provider_unavailable", 429, "rate limit"),
    "no-quota": Failure(refusal(429, "insufficient_quota"), "provider_failed", 429, "out of quota or money"),
    "too-long": Failure(
        refusal(400, "context_length_exceeded"), "context_length_exceeded", 400, "longer than"
    ),
    "policy": Failure(refusal(400, "content_policy_violation"), "content_policy_violation", 400, "policy"),
    "broken": Failure(refusal(500), "provider_unavailable", 500, "the vendor failed"),
    "overloaded": Failure(refusal(529), "provider_unavailable", 529, "overloaded"),
    "silent": Failure(
        Reply(before=(Stop.SILENCE,)),
        "deadline_exceeded",
        0,
        "deadline",
        headers={"X-Request-Timeout": "1.5"},
    ),
    "nonsense": Failure(Reply(steps=(VENDOR_TEXT.encode(),)), "provider_failed", 200, "not JSON"),
    "unreachable": Failure(None, "provider_unavailable", 0, "can't be connected to"),
    "cut": Failure(
        Answer(f"{VENDOR_TEXT} and more", at={1: Stop.RESET}),
        "provider_failed",
        200,
        "broke off",
        stream=True,
    ),
}

MODEL = """
[models.{name}]
type = "text"
limits = {{ max_input_tokens = 1000, max_output_tokens = 100 }}
price = {{ million_input_tokens = "1", million_output_tokens = "1" }}
price_version = "1"
[[models.{name}.routes]]
provider = "{provider}"
model = "vendors-{name}"
"""


@dataclass(frozen=True)
class Rig:
    """A server whose log has all lines, its upstream, a live key, and clients."""

    served: Served
    upstream: FaultUpstream
    key: str
    drivers: Mapping[str, Any]

    async def ask(self, protocol: str, request_id: str, body: Mapping[str, Any], **options: Any) -> Outcome:
        """Runs a task."""
        outcome: Outcome = await self.drivers[protocol](
            TaskRequest(body, self.key, request_id=request_id, **options)
        )
        return outcome

    async def lines(self, request_id: str, event: str = "task") -> list[dict[str, Any]]:
        """Returns the lines with a request id, once there is one of that event."""
        async with asyncio.timeout(20):
            while True:
                found = [json.loads(line) for line in self.served.log().splitlines() if request_id in line]
                if any(line["event"].startswith(event) for line in found):
                    return found
                await asyncio.sleep(0.02)


@pytest.fixture(scope="module", name="rig")
async def _rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    folder = tmp_path_factory.mktemp("log")
    # Each failure has models of its own, so that no circuit breaker opens.
    models = [
        MODEL.format(name=f"{name}-{protocol}", provider="openai" if failure.script else "mistral")
        for name, failure in FAILURES.items()
        for protocol in ("rest", "grpc")
    ]
    catalog = folder / "catalog.toml"
    catalog.write_text("".join(models))
    async with FaultUpstream() as upstream:
        for name, failure in FAILURES.items():
            if failure.script is not None:
                upstream.when(f"{PROMPT} {name}.", failure.script)
        variables = {
            "POMELO_LOG_LEVEL": "debug",
            "POMELO_CATALOG": str(catalog),
            "OPENAI_API_KEY": VENDOR_KEY,
            "OPENAI_BASE_URL": upstream.openai_base_url,
            "MISTRAL_API_KEY": VENDOR_KEY,
            "MISTRAL_BASE_URL": f"http://127.0.0.1:{free_port()}",
            "BFL_API_KEY": VENDOR_KEY,
            "BFL_BASE_URL": upstream.bfl_base_url,
            "ELEVENLABS_API_KEY": VENDOR_KEY,
            "ELEVENLABS_BASE_URL": upstream.elevenlabs_base_url,
        }
        async with (
            serve(folder, **variables) as served,
            aiohttp.ClientSession() as session,
            grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel,
        ):
            drivers = {"rest": RestDriver(session, served.url), "grpc": GrpcDriver(channel)}
            yield Rig(served, upstream, await live_key(folder), drivers)


@PROTOCOL
@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_of_a_vendor_is_found_by_its_request_id(rig: Rig, protocol: str, name: str) -> None:
    failure, request_id = FAILURES[name], f"{protocol}-{name}"
    body = text_body(f"{PROMPT} {name}.", model=f"{name}-{protocol}")
    outcome = await rig.ask(protocol, request_id, body, stream=failure.stream, headers=failure.headers)
    assert outcome.code == failure.code
    *attempts, task = await rig.lines(request_id)
    attempt = attempts[-1]
    assert attempt["event"] == "attempt failed"
    for line in (attempt, task):
        assert line["provider"] == ("mistral" if failure.script is None else "openai")
        assert (line["provider_model"], line["route"]) == (f"vendors-{name}-{protocol}", 1)
        assert line.get("upstream_status", 0) == failure.upstream_status
        assert line["code"] == failure.code
    assert attempt["level"] == "warning"
    assert attempt["next"] == "end"
    assert failure.reason in attempt["reason"]
    assert attempt["attempt"] == task["attempts"] == len(attempts)
    assert (task["level"], task["outcome"], task["protocol"], task["mode"]) == (
        "info",
        "failed",
        protocol,
        "live",
    )
    assert task["account"] == "default"
    if failure.upstream_status >= 400:
        assert attempt["vendor_request_id"] == task["vendor_request_id"] == f"req_{failure.upstream_status}"
    assert ("cost" in task) == failure.stream


@PROTOCOL
async def test_a_failed_image_and_a_failed_speech_are_found_by_their_request_ids(
    rig: Rig, protocol: str
) -> None:
    refusals = {
        "image": bfl_protocol.error_reply(402, VENDOR_TEXT),
        "tts": elevenlabs_protocol.error_reply(401, "quota_exceeded", message=VENDOR_TEXT),
    }
    fields = {"image": "prompt", "tts": "text"}
    for name, reply in refusals.items():
        prompt, request_id = f"{PROMPT} {name}-{protocol}", f"{protocol}-{name}"
        rig.upstream.when(prompt, reply)
        outcome = await rig.ask(protocol, request_id, TASK_BODIES[name] | {fields[name]: prompt})
        assert outcome.code == "provider_failed"
        *_, attempt, task = await rig.lines(request_id)
        for line in (attempt, task):
            assert line["provider"] == {"image": "bfl", "tts": "elevenlabs"}[name]
            assert line["upstream_status"] == reply.status
            assert line["route"] == 1
            assert line["reason"]


@PROTOCOL
async def test_a_completed_task_is_one_line_with_its_times_and_its_cost(rig: Rig, protocol: str) -> None:
    rig.upstream.when(f"{PROMPT} fine", Answer(VENDOR_TEXT))
    request_id = f"{protocol}-fine"
    outcome = await rig.ask(protocol, request_id, text_body(f"{PROMPT} fine"), stream=True)
    (task,) = await rig.lines(request_id)
    assert (task["event"], task["outcome"], task["status"], task["upstream_status"]) == (
        "task", "completed", 200, 200,
    )  # fmt: skip
    assert task["cost"] == outcome.metadata.get("x-credits-charged", task["cost"])
    assert float(task["cost"]) > 0
    assert 0 < task["upstream_ms"] <= task["ms"]
    assert task["bytes"] == len(VENDOR_TEXT)
    assert task["task_id"] == outcome.id
    assert task["time"].endswith("+00:00")
    assert "code" not in task


@PROTOCOL
async def test_a_refusal_before_the_engine_is_a_line_too(rig: Rig, protocol: str) -> None:
    request_id = f"{protocol}-unknown"
    outcome = await rig.drivers[protocol](
        TaskRequest(text_body(PROMPT), "pml_live_canary", request_id=request_id)
    )
    assert outcome.code == "invalid_api_key"
    (line,) = await rig.lines(request_id, "refused")
    assert (line["level"], line["code"], line["status"]) == ("info", "invalid_api_key", 401)
    assert line["method"] == {"rest": "POST /api/v1/task", "grpc": "TaskService/RunTask"}[protocol]
    assert line["address"] == "127.0.0.1"


async def test_a_model_name_can_forge_no_line(rig: Rig) -> None:
    name = 'no-such\n{"event":"task","forged":1}\x1b[2J\u2028' + "x" * 500
    await rig.ask("grpc", "grpc-forged", text_body(PROMPT, model=name))
    (line,) = await rig.lines("grpc-forged")
    assert line["outcome"] == "refused"
    assert "forged" not in line
    assert len(line["model"]) < 200
    assert "\\x1b" in line["model"]


async def test_no_line_has_content_a_key_or_text_of_a_vendor(rig: Rig) -> None:
    await asyncio.gather(
        *[
            rig.ask("rest", "rest-canary", text_body(f"{PROMPT} {name}.", model=f"{name}-rest"))
            for name in ("nonsense", "policy")
        ],
        rig.ask("rest", "rest-canary", TASK_BODIES["image"] | {"prompt": 7, "width": PROMPT}),
        rig.ask("rest", "rest-canary", {"model": "gpt-4", PROMPT: 1}),
    )
    await rig.lines("rest-canary", "refused")
    log = rig.served.log()
    assert '"level":"debug"' in log
    for secret in (PROMPT, VENDOR_KEY, VENDOR_TEXT, rig.key, "pml_live_canary"):
        assert secret not in log
