"""The limits of a plan over all protocols, and the requests that they refuse."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import datetime
from typing import Any

import pytest

from pomelo.testing import Answer, Gate
from tests.app import Account, RunningApp, app_fixture
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, PROTOCOLS, REST_PROTOCOL
from tests.integration.leaving import LeavingClient
from tests.tasks import TASK_BODIES, text_body

app = app_fixture()


# --- requests per minute


@PROTOCOL_AND_STREAM
async def test_exactly_the_limit_is_admitted_and_rejected_requests_do_not_count(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account("five")
    # Invalid requests do not count toward the limit.
    for body in (text_body(temperature=9), text_body(model="gpt-99")):
        await app.ask(protocol, account.test, body, stream=stream)
    requests = [app.ask(protocol, account.test, text_body(), stream=stream) for _ in range(20)]
    answers = await asyncio.gather(*requests)
    assert sorted(outcome.code for outcome in answers) == ["ok"] * 5 + ["rate_limit_exceeded"] * 15
    assert len(await app.records(account)) == 5
    for outcome in answers:
        if outcome.code != "ok":
            until = int(outcome.headers["x-ratelimit-reset"])
            message = re.fullmatch(r"Rate limit exceeded\. Reset at (\S+)", outcome.message)
            assert message is not None
            assert datetime.fromisoformat(message[1]).timestamp() == until
            assert outcome.headers["x-ratelimit-remaining"] == "0"
            assert abs(time.time() + int(outcome.headers["retry-after"]) - until) <= 2
            assert 0 < int(outcome.headers["retry-after"]) <= 60
    assert sorted(int(t.headers["x-ratelimit-remaining"]) for t in answers if t.code == "ok")[0] == 0


async def test_all_protocols_share_a_limit_and_each_mode_has_its_own(app: RunningApp) -> None:
    account = await app.account("five")
    for protocol in ("grpc", "rest", "remote", "grpc", "rest"):
        assert (await app.ask(protocol, account.test, text_body())).code == "ok"
    for protocol in PROTOCOLS:
        assert (await app.ask(protocol, account.test, text_body())).code == "rate_limit_exceeded"
        outcome = await app.get(protocol, account.live, "/api/v1/models")
        assert outcome.headers["x-ratelimit-remaining"] == "5"
    assert (await app.ask("grpc", account.live, text_body())).code == "ok"


# --- concurrency


@PROTOCOL_AND_STREAM
async def test_a_running_task_counts_as_concurrent_until_it_ends(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account("wide")
    gates = [Gate(), Gate()]
    prompts = [f"concurrent {protocol} {stream} {n}" for n in range(2)]
    for gate, prompt in zip(gates, prompts, strict=True):
        app.upstream.when(prompt, Answer("one two", at={1: gate}))
    running = [
        asyncio.create_task(app.ask(protocol, account.live, text_body(p, max_tokens=10), stream=stream))
        for p in prompts
    ]
    for gate in gates:
        await gate.reached.wait()
    third = await app.ask(protocol, account.live, text_body(max_tokens=10), stream=stream)
    assert third.code == "concurrency_limit_exceeded"
    assert third.headers["x-ratelimit-remaining-concurrent"] == "0"
    assert third.headers["retry-after"] == "1"
    in_test_mode = await app.ask(protocol, account.test, text_body(), stream=stream)
    assert in_test_mode.code == "ok", "test mode has its own limit"
    gates[0].open()
    assert (await running[0]).code == "ok"
    assert (await app.ask(protocol, account.live, text_body(max_tokens=10), stream=stream)).code == "ok"
    gates[1].open()
    assert (await running[1]).code == "ok"
    assert await app.concurrency(account, live=True) == 0


@PROTOCOL_AND_STREAM
async def test_a_failed_task_releases_its_slot_before_the_error_is_sent(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account("wide")
    for _ in range(6):
        outcome = await app.ask(protocol, account.test, text_body("[[cut]]", max_tokens=5), stream=stream)
        assert outcome.code == "provider_failed"


# --- tokens per minute


@PROTOCOL
async def test_tokens_per_minute_are_counted_by_model_and_reported(app: RunningApp, protocol: str) -> None:
    account = await app.account("wide")
    app.upstream.when(f"count {protocol}", Answer("word " * 900))
    first = await app.ask(protocol, account.live, text_body(f"count {protocol}"))
    assert first.code == "ok"
    assert first.usage[2] > 900
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) == 1000 - first.usage[2]
    refused = await app.ask(protocol, account.live, text_body(max_tokens=100))
    assert refused.code == "token_limit_exceeded"
    reset = int(refused.headers["x-ratelimit-reset-tokens"])
    assert abs(time.time() + int(refused.headers["retry-after"]) - reset) <= 2
    assert datetime.fromisoformat(refused.message.split("Reset at ")[1]).timestamp() == reset
    other = await app.ask(protocol, account.live, text_body(model="gpt-3.5-turbo", max_tokens=100))
    assert other.code == "ok", "another model has its own tokens"
    large = await app.ask(protocol, account.live, text_body(max_tokens=1001))
    assert large.code == "token_limit_exceeded"
    assert "1,000 a minute" in large.message


@PROTOCOL_AND_STREAM
async def test_a_task_that_fails_at_the_provider_counts_as_a_request_without_tokens(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account("wide")
    for _ in range(3):  # each is more than half of the tokens of a minute
        body = text_body("[[error:provider_failed]]", max_tokens=600)
        failed = await app.ask(protocol, account.test, body, stream=stream)
        assert failed.code == "provider_failed"


@PROTOCOL
@pytest.mark.parametrize("effort", ["none", "high"])
async def test_a_stream_that_is_left_keeps_its_estimate_of_tokens_if_the_model_reasons(
    app: RunningApp, protocol: str, effort: str
) -> None:
    account = await app.account("wide")
    prompt = f"think {protocol} {effort}"
    app.upstream.when(prompt, Answer("one two three", at={2: Gate()}))
    body = text_body(prompt, max_tokens=600, reasoning_effort=effort)
    client = LeavingClient(app, protocol, account.live, body, stream=True)
    await client.has(1)
    await client.leave()
    await app.idle(account, live=True)
    again = await app.ask(protocol, account.live, text_body("again", max_tokens=600))
    assert again.code == ("ok" if effort == "none" else "token_limit_exceeded")


# --- allowed models


@PROTOCOL_AND_STREAM
async def test_a_model_must_be_allowed_by_the_key_and_the_plan(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    by_plan = await app.account("images")
    by_key = await app.account("unlimited", models=("gpt-4",))
    by_both = await app.account("images", models=("flux-1-pro", "gpt-4"))
    cases = [
        (by_plan, TASK_BODIES["image"], "ok"),
        (by_plan, text_body(), "model_not_allowed"),
        (by_key, text_body(), "ok"),
        (by_key, TASK_BODIES["image"], "model_not_allowed"),
        (by_both, TASK_BODIES["image"], "ok"),
        (by_both, text_body(), "model_not_allowed"),
        (by_both, {**TASK_BODIES["image"], "model": "flux-1-dev"}, "model_not_allowed"),
    ]
    for account, body, code in cases:
        assert (await app.ask(protocol, account.test, body, stream=stream)).code == code


# --- order of errors


@PROTOCOL_AND_STREAM
async def test_errors_have_an_order(app: RunningApp, protocol: str, stream: bool) -> None:
    # Each request has at least two errors, which are neighbours in the order.
    poor = await app.account("five", live=1, test=1)
    claude = text_body("[[words:5]]", model="claude-3-opus", max_tokens=5)  # the app has no key for it

    async def code(key: str, body: dict[str, Any]) -> str:
        return (await app.ask(protocol, key, body, stream=stream)).code

    assert await code("pml_live_no", text_body(model="gpt-99", temperature=9)) == "invalid_api_key"
    assert await code(poor.live, text_body(model="gpt-99", temperature=9)) == "unsupported_model"
    assert await code(poor.live, {**claude, "temperature": 9}) == "invalid_parameter"
    assert await code(poor.live, claude) == "insufficient_credits"
    full = await app.account("five")
    for _ in range(5):
        assert await code(full.live, text_body(max_tokens=5)) == "ok"
    assert await code(full.live, {**claude, "temperature": 9}) == "invalid_parameter"
    assert await code(full.live, claude) == "rate_limit_exceeded"
    rich = await app.account("five")
    assert await code(rich.live, claude) == "provider_not_configured"
    spent = await app.account("five", live=3000)
    while (last := await code(spent.live, text_body(max_tokens=5))) == "ok":
        pass
    assert last == "rate_limit_exceeded", "limits come before credits"


@REST_PROTOCOL
async def test_the_gateway_checks_the_key_before_the_body_and_the_body_before_the_model(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("images")
    for key, data, code in (
        ("pml_test_no", b"{", "invalid_api_key"),
        (account.test, b'{"model": "gpt-99", ', "invalid_body"),
        (account.test, b'{"model": "gpt-4", "sausage": 1}', "model_not_allowed"),
        (account.test, b'{"model": "flux-1-pro", "sausage": 1}', "invalid_parameter"),
    ):
        answer = await app.post(protocol, key, data=data, headers={"Content-Type": "application/json"})
        assert (await answer.json())["error"]["code"] == code


@PROTOCOL
async def test_a_task_without_a_configured_provider_counts_toward_no_limit(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("five")
    outcome = await app.ask(protocol, account.live, text_body(model="claude-3-opus"))
    assert outcome.code == "provider_not_configured"
    assert outcome.headers["x-ratelimit-remaining"] == "5"
    assert outcome.headers["x-credits-remaining"] == "1000000"
    assert "x-credits-charged" not in outcome.metadata
    assert await app.concurrency(account, live=True) == 0
    assert not await app.records(account)


# --- a client that paces itself by the headers


@PROTOCOL
async def test_a_client_that_reads_the_headers_reaches_the_limit_without_an_error(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("two hundred")
    pacer = Pacer(app, protocol, account)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for _ in range(30):
            group.create_task(pacer.work())
    assert set(pacer.codes) == {"ok"}
    assert len(pacer.codes) >= 0.99 * 200


class Pacer:
    """Runs as many tasks, and as many concurrently, as the headers allow, until the window is exhausted."""

    def __init__(self, app: RunningApp, protocol: str, account: Account) -> None:
        self.app, self.protocol, self.account = app, protocol, account
        self.codes: list[str] = []
        self.left = 1
        self.running = 0

    async def work(self) -> None:
        """Runs one task at a time while the window has requests left. Several workers run concurrently."""
        while self.left or self.running:
            if not self.left:
                await asyncio.sleep(0)
                continue
            self.left -= 1
            self.running += 1
            body = {"model": "flux-1-schnell", "prompt": "x", "width": 64, "height": 64}
            outcome = await self.app.ask(self.protocol, self.account.test, body)
            self.codes.append(outcome.code)
            self.running -= 1
            # The headers may not count the requests of other workers yet.
            allowed = (int(outcome.headers[f"x-ratelimit-remaining{of}"]) for of in ("", "-concurrent"))
            self.left = max(0, min(allowed) - self.running)


@PROTOCOL_AND_STREAM
async def test_a_large_invalid_task_counts_as_a_request_and_a_small_one_does_not(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account("five")
    large = text_body("word " * 20_000, temperature=9)
    for left in ("4", "3"):
        outcome = await app.ask(protocol, account.test, large, stream=stream)
        assert (outcome.code, outcome.headers["x-ratelimit-remaining"]) == ("invalid_parameter", left)
    outcome = await app.ask(protocol, account.test, text_body("word", temperature=9), stream=stream)
    assert (outcome.code, outcome.headers["x-ratelimit-remaining"]) == ("invalid_parameter", "3")
    for _ in range(3):
        await app.ask(protocol, account.test, large, stream=stream)
    assert (await app.ask(protocol, account.test, large, stream=stream)).code == "rate_limit_exceeded"
