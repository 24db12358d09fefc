"""Limits of a plan over the real wires: the headers that tell of them, and what is refused, exactly."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.testing import Answer, Gate
from tests.app import RICH, Account, RunningApp, run_app
from tests.driver import PROTOCOLS, Outcome
from tests.tasks import TASK_BODIES, text_body

REQUESTS = {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"}
TOKENS = {"x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"}
SLOTS = {"x-ratelimit-limit-concurrent", "x-ratelimit-remaining-concurrent"}
ALWAYS = REQUESTS | SLOTS | {"x-credits-remaining", "x-request-id", "x-pomelo-mode"}
WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("limits")) as opened:
        yield opened


def check(told: Outcome, *, tokens: bool, mode: str = "test") -> None:
    """An answer bears every header of a plan that limits everything."""
    names = ALWAYS | (TOKENS if tokens else set())
    assert names <= set(told.headers), names - set(told.headers)
    assert tokens or not TOKENS & set(told.headers)
    given = told.headers
    assert given["x-pomelo-mode"] == mode
    assert given["x-ratelimit-limit"] == "1000"
    assert 0 <= int(given["x-ratelimit-remaining"]) <= 1000
    assert time.time() - 1 <= int(given["x-ratelimit-reset"]) <= time.time() + 61
    assert given["x-ratelimit-limit-concurrent"] == "50"
    assert 0 <= int(given["x-ratelimit-remaining-concurrent"]) <= 50
    assert re.fullmatch(r"\d+(\.\d{1,6})?", given["x-credits-remaining"])
    if tokens:
        assert given["x-ratelimit-limit-tokens"] == "100000"
        assert 0 < int(given["x-ratelimit-remaining-tokens"]) <= 100_000
        assert time.time() - 1 <= int(given["x-ratelimit-reset-tokens"]) <= time.time() + 61


# --- the headers


@WAY
@HOW
@pytest.mark.parametrize("kind", TASK_BODIES)
async def test_an_answer_of_every_kind_bears_every_header(
    house: RunningApp, kind: str, way: str, stream: bool
) -> None:
    caller = await house.account("all")
    told = await house.ask(way, caller.test, TASK_BODIES[kind], stream=stream)
    assert told.code == "ok"
    check(told, tokens=kind == "text")
    if way == "grpc" and stream:
        left = RICH - (await house.records(caller))[0].cost
        assert told.trailers["x-credits-remaining"] == f"{left / 10**6:.6f}".rstrip("0").rstrip(".")
        assert told.trailers["x-ratelimit-remaining-concurrent"] == "50"
        assert float(told.trailers["x-credits-charged"]) > 0
    elif not stream:
        assert float(told.headers["x-credits-charged"]) > 0
        assert told.headers["x-ratelimit-remaining-concurrent"] == "50"
        assert told.headers["x-ratelimit-remaining"] == "999"


@pytest.mark.parametrize("way", ["rest", "remote"])
@pytest.mark.parametrize("kind", ["image", "tts", "sts"])
async def test_raw_bytes_bear_every_header(house: RunningApp, kind: str, way: str) -> None:
    caller = await house.account("all")
    told = await house.ask(way, caller.test, TASK_BODIES[kind], accept="image/*, audio/*")
    assert told.status == 200
    assert told.content
    check(told, tokens=False)
    if kind == "image":  # it comes in one piece: all is known by then
        assert told.headers["x-ratelimit-remaining-concurrent"] == "50"
        assert told.headers["x-credits-charged"] == "0.04"


@pytest.mark.parametrize("way", ["rest", "remote"])
async def test_a_stream_of_one_event_bears_what_its_end_told(house: RunningApp, way: str) -> None:
    caller = await house.account("all")
    told = await house.ask(way, caller.test, TASK_BODIES["stt"], stream=True)
    assert told.done
    assert told.headers["x-ratelimit-remaining-concurrent"] == "50"
    assert float(told.headers["x-credits-charged"]) > 0


REFUSED: dict[str, tuple[dict[str, Any], str, bool]] = {
    "a missing field": ({"model": "gpt-4"}, "missing_parameter", True),
    "a wrong field": (text_body(temperature=9), "invalid_parameter", True),
    "a wrong field of a picture": ({**TASK_BODIES["image"], "width": 5}, "invalid_parameter", False),
    "an unknown model": (text_body(model="gpt-99"), "unsupported_model", False),
    "a trigger": (text_body("[[error:content_policy_violation]]"), "content_policy_violation", True),
    "a provoked 503": (text_body("[[error:provider_unavailable]]"), "provider_unavailable", True),
    "a failing sound": (
        {**TASK_BODIES["tts"], "text": "[[error:provider_failed]]"},
        "provider_failed",
        False,
    ),
}


@WAY
@HOW
@pytest.mark.parametrize("name", REFUSED)
async def test_a_refusal_bears_every_header(house: RunningApp, name: str, way: str, stream: bool) -> None:
    body, code, tokens = REFUSED[name]
    caller = await house.account("all")
    told = await house.ask(way, caller.test, body, stream=stream)
    assert told.code == code
    check(told, tokens=tokens)
    assert told.metadata["x-credits-remaining"] == "1000000", "a refusal costs nothing"
    assert told.metadata["x-ratelimit-remaining-concurrent"] == "50"
    assert told.metadata.get("x-credits-charged", "0") == "0"
    assert ("retry-after" in told.headers) == (told.status == 503 or (way == "grpc" and "503" in name))


@pytest.mark.parametrize("way", ["rest", "remote"])
async def test_what_a_door_refuses_bears_every_header(house: RunningApp, way: str) -> None:
    caller = await house.account("all")
    url = f"{house.urls[way]}/api/v1/task"
    bearer = {"Authorization": f"Bearer {caller.test}"}
    for data, kind, status in (
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"x", "text/plain", 415),
        (b" " * 9_000_000, "application/json", 413),
        (b"--x--", "multipart/form-data; boundary=x", 400),
    ):
        headers = bearer | {"Content-Type": kind}
        async with house.session.post(url, data=data, headers=headers) as answer:
            assert answer.status == status
            check(Outcome(headers={k.lower(): v for k, v in answer.headers.items()}), tokens=False)


@WAY
async def test_a_list_of_models_bears_every_header(house: RunningApp, way: str) -> None:
    caller = await house.account("all")
    check(await house.get(way, caller.test, "/api/v1/models"), tokens=False)


@pytest.mark.parametrize("way", ["rest", "remote"])
async def test_what_else_is_asked_for_bears_every_header(house: RunningApp, way: str) -> None:
    caller = await house.account("all")
    check(await house.get(way, caller.live, "/api/v1/models/gpt-4"), tokens=True, mode="live")
    check(await house.get(way, caller.test, "/api/v1/models/flux-1-pro"), tokens=False)
    missing = await house.get(way, caller.test, "/media/media_nothing.png")
    assert missing.status == 404
    check(missing, tokens=False)
    unknown = await house.get(way, caller.test, "/api/v1/models/gpt-99")
    assert unknown.code == "unsupported_model"
    check(unknown, tokens=False)


async def test_an_upload_bears_every_header(house: RunningApp) -> None:
    caller = await house.account("all")

    async def pieces() -> AsyncIterator[UploadMediaRequest]:
        yield UploadMediaRequest(content_type="audio/mpeg")
        yield UploadMediaRequest(chunk=b"some sound")

    metadata = [("authorization", f"Bearer {caller.test}")]
    call = MediaServiceStub(house.channel).UploadMedia(pieces(), metadata=metadata)
    await call
    check(Outcome(headers={str(k): str(v) for k, v in await call.trailing_metadata()}), tokens=False)


@WAY
@HOW
async def test_without_limits_there_are_no_headers_of_limits(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account("unlimited")
    for body in (text_body(), text_body(temperature=9), TASK_BODIES["image"]):
        told = await house.ask(way, caller.test, body, stream=stream)
        assert not [name for name in told.metadata if name.startswith("x-ratelimit")]
        assert "x-credits-remaining" in told.headers
        assert told.headers["x-pomelo-mode"] == "test"


@WAY
async def test_a_stranger_is_told_nothing(house: RunningApp, way: str) -> None:
    told = await house.ask(way, "pml_test_junk", text_body())
    assert told.code == "invalid_api_key"
    assert not [n for n in told.metadata if n.startswith(("x-ratelimit", "x-credits", "x-pomelo"))]


# --- requests a minute


@WAY
@HOW
async def test_exactly_the_limit_is_admitted_and_the_refused_use_up_nothing(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account("five")
    # What is refused for another reason is none of them.
    for body in (text_body(temperature=9), text_body(model="gpt-99")):
        await house.ask(way, caller.test, body, stream=stream)
    asked = [house.ask(way, caller.test, text_body(), stream=stream) for _ in range(20)]
    answers = await asyncio.gather(*asked)
    assert sorted(told.code for told in answers) == ["ok"] * 5 + ["rate_limit_exceeded"] * 15
    assert len(await house.records(caller)) == 5
    for told in answers:
        if told.code != "ok":
            until = int(told.headers["x-ratelimit-reset"])
            said = re.fullmatch(r"Rate limit exceeded\. Reset at (\S+)", told.message)
            assert said is not None
            assert datetime.fromisoformat(said[1]).timestamp() == until
            assert told.headers["x-ratelimit-remaining"] == "0"
            assert abs(time.time() + int(told.headers["retry-after"]) - until) <= 2
            assert 0 < int(told.headers["retry-after"]) <= 60
    assert sorted(int(t.headers["x-ratelimit-remaining"]) for t in answers if t.code == "ok")[0] == 0


async def test_a_limit_is_one_for_all_wires_and_each_side_has_its_own(house: RunningApp) -> None:
    caller = await house.account("five")
    for way in ("grpc", "rest", "remote", "grpc", "rest"):
        assert (await house.ask(way, caller.test, text_body())).code == "ok"
    for way in PROTOCOLS:
        assert (await house.ask(way, caller.test, text_body())).code == "rate_limit_exceeded"
        told = await house.get(way, caller.live, "/api/v1/models")
        assert told.headers["x-ratelimit-remaining"] == "5"
    assert (await house.ask("grpc", caller.live, text_body())).code == "ok"


# --- at once


@WAY
@HOW
async def test_slots_are_taken_while_tasks_run_and_free_at_once_when_they_end(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account("wide")
    gates = [Gate(), Gate()]
    prompts = [f"slot {way} {stream} {n}" for n in range(2)]
    for gate, prompt in zip(gates, prompts, strict=True):
        house.upstream.when(prompt, Answer("one two", at={1: gate}))
    running = [
        asyncio.create_task(house.ask(way, caller.live, text_body(p, max_tokens=10), stream=stream))
        for p in prompts
    ]
    for gate in gates:
        await gate.reached.wait()
    third = await house.ask(way, caller.live, text_body(max_tokens=10), stream=stream)
    assert third.code == "concurrency_limit_exceeded"
    assert third.headers["x-ratelimit-remaining-concurrent"] == "0"
    assert third.headers["retry-after"] == "1"
    assert (await house.ask(way, caller.test, text_body(), stream=stream)).code == "ok", (
        "the test side has its own"
    )
    gates[0].open()
    assert (await running[0]).code == "ok"
    assert (await house.ask(way, caller.live, text_body(max_tokens=10), stream=stream)).code == "ok"
    gates[1].open()
    assert (await running[1]).code == "ok"
    assert await house.concurrency(caller, live=True) == 0


@WAY
@HOW
async def test_a_failed_task_frees_its_slot_before_it_is_told(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account("wide")
    for _ in range(6):
        told = await house.ask(way, caller.test, text_body("[[cut]]", max_tokens=5), stream=stream)
        assert told.code == "provider_failed"


# --- tokens a minute


@WAY
async def test_tokens_of_a_minute_are_counted_by_model_and_told(house: RunningApp, way: str) -> None:
    caller = await house.account("wide")
    house.upstream.when(f"count {way}", Answer("word " * 900))
    first = await house.ask(way, caller.live, text_body(f"count {way}"))
    assert first.code == "ok"
    assert first.usage[2] > 900
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) == 1000 - first.usage[2]
    refused = await house.ask(way, caller.live, text_body(max_tokens=100))
    assert refused.code == "token_limit_exceeded"
    assert (
        abs(
            time.time()
            + int(refused.headers["retry-after"])
            - int(refused.headers["x-ratelimit-reset-tokens"])
        )
        <= 2
    )
    at = datetime.fromtimestamp(int(refused.headers["x-ratelimit-reset-tokens"])).astimezone()
    assert at.astimezone(tz=None) == datetime.fromisoformat(refused.message.split("Reset at ")[1])
    other = await house.ask(way, caller.live, text_body(model="gpt-3.5-turbo", max_tokens=100))
    assert other.code == "ok", "another model has tokens of its own"
    large = await house.ask(way, caller.live, text_body(max_tokens=1001))
    assert large.code == "token_limit_exceeded"
    assert "1,000 a minute" in large.message


# --- who may use what


@WAY
@HOW
async def test_a_model_must_be_of_the_key_and_of_the_plan(house: RunningApp, way: str, stream: bool) -> None:
    by_plan = await house.account("pictures")
    by_key = await house.account("unlimited", models=("gpt-4",))
    by_both = await house.account("pictures", models=("flux-1-pro", "gpt-4"))
    cases = [
        (by_plan, TASK_BODIES["image"], "ok"),
        (by_plan, text_body(), "model_not_allowed"),
        (by_key, text_body(), "ok"),
        (by_key, TASK_BODIES["image"], "model_not_allowed"),
        (by_both, TASK_BODIES["image"], "ok"),
        (by_both, text_body(), "model_not_allowed"),
        (by_both, {**TASK_BODIES["image"], "model": "flux-1-dev"}, "model_not_allowed"),
    ]
    for caller, body, code in cases:
        assert (await house.ask(way, caller.test, body, stream=stream)).code == code


# --- what is refused first


@WAY
@HOW
async def test_refusals_have_an_order(house: RunningApp, way: str, stream: bool) -> None:
    """Each request is wrong in two neighbouring ways, or more."""
    poor = await house.account("five", live=1, test=1)
    claude = text_body("[[words:5]]", model="claude-3-opus", max_tokens=5)  # nobody has its credentials

    async def code(key: str, body: dict[str, Any]) -> str:
        return (await house.ask(way, key, body, stream=stream)).code

    assert await code("pml_live_no", text_body(model="gpt-99", temperature=9)) == "invalid_api_key"
    assert await code(poor.live, text_body(model="gpt-99", temperature=9)) == "unsupported_model"
    assert await code(poor.live, {**claude, "temperature": 9}) == "invalid_parameter"
    assert await code(poor.live, claude) == "insufficient_credits"
    full = await house.account("five")
    for _ in range(5):
        assert await code(full.live, text_body(max_tokens=5)) == "ok"
    assert await code(full.live, {**claude, "temperature": 9}) == "invalid_parameter"
    assert await code(full.live, claude) == "rate_limit_exceeded"
    rich = await house.account("five")
    assert await code(rich.live, claude) == "provider_not_configured"
    spent = await house.account("five", live=3000)
    while (last := await code(spent.live, text_body(max_tokens=5))) == "ok":
        pass
    assert last == "rate_limit_exceeded", "limits go ahead of credits"


@pytest.mark.parametrize("way", ["rest", "remote"])
async def test_at_a_door_the_key_goes_ahead_of_the_body_and_the_body_ahead_of_the_model(
    house: RunningApp, way: str
) -> None:
    caller = await house.account("pictures")
    url = f"{house.urls[way]}/api/v1/task"
    for key, data, code in (
        ("pml_test_no", b"{", "invalid_api_key"),
        (caller.test, b'{"model": "gpt-99", ', "invalid_body"),
        (caller.test, b'{"model": "gpt-4", "sausage": 1}', "model_not_allowed"),
        (caller.test, b'{"model": "flux-1-pro", "sausage": 1}', "invalid_parameter"),
    ):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        async with house.session.post(url, data=data, headers=headers) as answer:
            assert (await answer.json())["error"]["code"] == code


@WAY
async def test_a_provider_that_is_not_configured_takes_nothing(house: RunningApp, way: str) -> None:
    caller = await house.account("five")
    told = await house.ask(way, caller.live, text_body(model="claude-3-opus"))
    assert told.code == "provider_not_configured"
    assert told.headers["x-ratelimit-remaining"] == "5"
    assert told.headers["x-credits-remaining"] == "1000000"
    assert "x-credits-charged" not in told.metadata
    assert await house.concurrency(caller, live=True) == 0
    assert not await house.records(caller)


# --- a client that only reads the headers


@WAY
async def test_who_reads_the_headers_reaches_the_limit_without_a_refusal(house: RunningApp, way: str) -> None:
    caller = await house.account("two hundred")
    pacer = Pacer(house, way, caller)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for _ in range(30):
            group.create_task(pacer.work())
    assert set(pacer.codes) == {"ok"}
    assert len(pacer.codes) >= 0.99 * 200


class Pacer:
    """Asks as often and as much at once as the headers allow, and stops at the end of the window's requests."""

    def __init__(self, house: RunningApp, way: str, caller: Account) -> None:
        self.house, self.way, self.caller = house, way, caller
        self.codes: list[str] = []
        self.left = 1
        self.running = 0

    async def work(self) -> None:
        """One line of work of several: a request whenever there is one left that nobody has on the way."""
        while self.left or self.running:
            if not self.left:
                await asyncio.sleep(0)
                continue
            self.left -= 1
            self.running += 1
            body = {"model": "flux-1-schnell", "prompt": "x", "width": 64, "height": 64}
            told = await self.house.ask(self.way, self.caller.test, body)
            self.codes.append(told.code)
            self.running -= 1
            # Others on the way may not be counted in it yet.
            allowed = (int(told.headers[f"x-ratelimit-remaining{of}"]) for of in ("", "-concurrent"))
            self.left = max(0, min(allowed) - self.running)


@WAY
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_large_invalid_task_counts_as_a_request_and_a_small_one_does_not(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account("five")
    large = text_body("word " * 20_000, temperature=9)
    for left in ("4", "3"):
        told = await house.ask(way, caller.test, large, stream=stream)
        assert (told.code, told.headers["x-ratelimit-remaining"]) == ("invalid_parameter", left)
    told = await house.ask(way, caller.test, text_body("word", temperature=9), stream=stream)
    assert (told.code, told.headers["x-ratelimit-remaining"]) == ("invalid_parameter", "3")
    for _ in range(3):
        await house.ask(way, caller.test, large, stream=stream)
    assert (await house.ask(way, caller.test, large, stream=stream)).code == "rate_limit_exceeded"
