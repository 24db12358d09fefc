"""With a live key, over every front end: failures of the provider, and clients that disconnect."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.app import App, open_app
from pomelo.testing import (
    Answer,
    FaultUpstream,
    Gate,
    Received,
    Reply,
    Script,
    Stop,
    broken_json,
    error_reply,
    page,
)
from tests.app import app_settings, endow
from tests.conftest import Keys
from tests.driver import PROTOCOLS, STREAM, TaskRequest
from tests.parity.comparison import Driver, ask_all, assert_same
from tests.rest_driver import RestDriver
from tests.tasks import text_body

CLOSED_WITHIN = 3.0
"""Seconds from a client's disconnect to the end of the upstream connection."""

FAULTS: dict[str, tuple[Script, str, str]] = {
    "500": (error_reply(500, "boom"), "provider_unavailable", "provider_unavailable"),
    "503 with a wait": (error_reply(503, "busy", headers={"Retry-After": "30"}), "provider_unavailable", "provider_unavailable"),
    "429": (error_reply(429, "slow", code="rate_limit_exceeded"), "provider_unavailable", "provider_unavailable"),
    "429 without money": (error_reply(429, "pay", code="credit_balance_exhausted"), "provider_failed", "provider_failed"),
    "401": (error_reply(401, "who", code="invalid_api_key"), "provider_failed", "provider_failed"),
    "404": (error_reply(404, "what", code="model_not_found"), "provider_failed", "provider_failed"),
    "too long": (error_reply(400, "long", code="context_length_exceeded"), "context_length_exceeded", "context_length_exceeded"),
    "policy": (error_reply(400, "no", code="content_policy_violation"), "content_policy_violation", "content_policy_violation"),
    "a page": (page(), "provider_failed", "provider_failed"),
    "broken JSON": (Reply(steps=(broken_json(),)), "provider_failed", "provider_failed"),
    "reset ahead of the answer": (Answer(before=(Stop.RESET,)), "provider_unavailable", "provider_unavailable"),
    "reset half way": (Answer("one two three four", at={2: Stop.RESET}), "provider_failed", "provider_failed"),
    "closed half way": (Answer("one two three four", at={2: Stop.CLOSE}), "provider_failed", "provider_failed"),
    "no end marker": (Answer(done=False), "ok", "provider_failed"),
    "content filter": (Answer(finish_reason="content_filter"), "ok", "ok"),
    "length": (Answer(finish_reason="length"), "ok", "ok"),
}  # fmt: skip


@STREAM
@pytest.mark.parametrize("name", FAULTS)
async def test_a_provider_failure_is_reported_equally_over_all_front_ends(
    name: str, stream: bool, clients: Mapping[str, Driver], keys: Keys, upstream: FaultUpstream
) -> None:
    script, whole_code, stream_code = FAULTS[name]
    prompt = f"fault {name}, {stream}"
    upstream.when(prompt, script)
    ask = TaskRequest(text_body(prompt), keys.live, stream)
    outcomes = await ask_all(clients, ask)
    assert {w: o.code for w, o in outcomes.items()} == dict.fromkeys(
        clients, stream_code if stream else whole_code
    )
    if name.endswith("half way") and stream:  # the close of a connection may arrive before the data
        for outcome in outcomes.values():
            outcome.output.clear()
    assert_same(outcomes, ask)
    assert {o.headers["x-pomelo-mode"] for o in outcomes.values()} == {"live"}


AUDIO = base64.b64encode(b"RIFF\x24\x00\x00\x00WAVE" + b"audio " * 2000).decode()
LIVE: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1.9, "seed": 7},
    "mixtral-8x22b": {"messages": [{"role": "user", "content": "Hi"}], "user": "u"},
    "flux-1-pro": {"prompt": "A kite", "width": 300, "height": 200, "seed": 1},
    "flux-1-dev": {"prompt": "A kite", "guidance_scale": 9, "output_format": "jpeg"},
    "flux-1-schnell": {"prompt": "A kite", "num_inference_steps": 50},
    "eleven-labs-tts": {"text": "Hello there.", "voice": "adam", "voice_settings": {"speed": 3}},
    "eleven-labs-sts": {"audio": AUDIO, "voice": "adam", "output_format": "pcm_16000"},
    "eleven-labs-stt": {"audio": AUDIO, "diarize": True},
}


@STREAM
@pytest.mark.parametrize("model", LIVE)
async def test_a_live_key_reaches_the_vendor_equally_over_all_front_ends(
    model: str, stream: bool, clients: Mapping[str, Driver], keys: Keys
) -> None:
    ask = TaskRequest({"model": model, **LIVE[model]}, keys.live, stream)
    outcomes = await ask_all(clients, ask)
    assert {w: (o.code, o.message) for w, o in outcomes.items()} == dict.fromkeys(clients, ("ok", ""))
    assert_same(outcomes, ask)
    assert {o.headers["x-pomelo-mode"] for o in outcomes.values()} == {"live"}


async def test_claude_serves_a_live_key(tmp_path: Path, upstream: FaultUpstream) -> None:
    settings = app_settings(tmp_path / "data", upstream, grpc="", anthropic_api_key="anthropic-upstream")
    async with open_app(settings) as app, aiohttp.ClientSession() as session:
        assert app.rest is not None
        await endow(app.store)
        _, key = await app.keyring.create(live=True)
        for model in ("claude-3-opus", "claude-3-sonnet", "claude-3-haiku"):
            for stream in (False, True):
                body = text_body("Hi", model, max_tokens=50)
                outcome = await RestDriver(session, "http://{}:{}".format(*app.rest))(
                    TaskRequest(body, key, stream)
                )
                assert outcome.code == "ok"
                assert outcome.output["text"]


@pytest.mark.parametrize("where", ["before the first byte", "half way"])
@STREAM
@pytest.mark.parametrize("front_end", PROTOCOLS)
async def test_a_disconnect_closes_the_upstream_connection_immediately(
    front_end: str,
    stream: bool,
    where: str,
    clients: Mapping[str, Driver],
    keys: Keys,
    upstream: FaultUpstream,
    app: App,
) -> None:
    gate = Gate()
    prompt = f"leave {front_end} {stream} {where}"
    answer = (
        Answer("one two three", before=(gate,))
        if where.startswith("before")
        else Answer("one two three", at={2: gate})
    )
    upstream.when(prompt, answer)
    client = asyncio.create_task(clients[front_end](TaskRequest(text_body(prompt), keys.live, stream)))
    await gate.reached.wait()
    request = _request(upstream, prompt)
    disconnected = asyncio.get_running_loop().time()
    client.cancel()
    async with asyncio.timeout(20):
        await request.left.wait()
        await app.draining.idle()
    assert request.left_at is not None
    assert request.left_at - disconnected < CLOSED_WITHIN
    with pytest.raises(asyncio.CancelledError):
        await client


@pytest.mark.parametrize("front_end", PROTOCOLS)
@STREAM
async def test_a_deadline_closes_the_upstream_connection_immediately(
    front_end: str, stream: bool, clients: Mapping[str, Driver], keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    prompt = f"late {front_end} {stream}"
    upstream.when(prompt, Answer("one two three", at={2: gate}))
    begin = time.monotonic()
    outcome = await clients[front_end](TaskRequest(text_body(prompt), keys.live, stream, timeout=1))
    assert outcome.code == "deadline_exceeded"
    assert time.monotonic() - begin < 10, "not only when the vendor has answered"
    async with asyncio.timeout(20):
        await _request(upstream, prompt).left.wait()


def _request(upstream: FaultUpstream, prompt: str) -> Received:
    (request,) = [r for r in upstream.requests if prompt in r.prompt]
    return request


async def test_a_test_key_never_reaches_a_provider(
    clients: Mapping[str, Driver], keys: Keys, upstream: FaultUpstream
) -> None:
    prompt = "this must stay in the sandbox"
    for stream in (False, True):
        outcomes = await ask_all(clients, TaskRequest(text_body(prompt), keys.test, stream))
        assert all("sandbox" in o.output["text"] for o in outcomes.values())
    assert not [r for r in upstream.requests if prompt in r.prompt]


def escaped(*texts: str) -> tuple[bytes, ...]:
    """Chunks of a chat completion whose texts are written as JSON escapes."""
    chunks = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    return tuple(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def complete(content: str) -> Script:
    """A complete chat completion whose text is written as JSON escapes."""
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 5.0, "completion_tokens": 2}}
    return Reply(steps=(json.dumps(body).encode(),))


FINISH = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
COUNT = b'data: {"choices":[],"usage":{"prompt_tokens":5.0,"completion_tokens":2.0}}\n\n'
UNUSUAL: dict[str, tuple[Script, str]] = {
    "a split pair": (Reply(steps=(*escaped("Hi \ud83d", "\ude00!"), FINISH, COUNT, b"data: [DONE]\n\n")), "Hi 😀!"),
    "a lone half": (Reply(steps=(*escaped("Hi \ud83d", "!"), FINISH, COUNT, b"data: [DONE]\n\n")), "Hi \ufffd!"),
    "a half at the end": (Reply(steps=(*escaped("Hi \ud83d"), FINISH, COUNT, b"data: [DONE]\n\n")), "Hi \ufffd"),
    "line separators": (
        Reply(steps=(*escaped("a\u2028b\u2029c\x85d"), FINISH, COUNT, b"data: [DONE]\n\n")),
        "a\u2028b\u2029c\x85d",
    ),
    "no end of the last line": (Reply(steps=(*escaped("Hi"), FINISH, COUNT, b"data: [DONE]")), "Hi"),
    "no count at the end": (
        Reply(steps=(*escaped("Hi"), COUNT, FINISH, b'data: {"choices":[],"usage":null}\n\ndata: [DONE]\n')),
        "Hi",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
async def test_an_unusual_stream_is_parsed_and_counted_equally_over_all_front_ends(
    name: str, clients: Mapping[str, Driver], keys: Keys, upstream: FaultUpstream
) -> None:
    script, text = UNUSUAL[name]
    prompt = f"odd stream: {name}"
    upstream.when(prompt, script)
    ask = TaskRequest(text_body(prompt), keys.live, stream=True)
    outcomes = await ask_all(clients, ask)
    for front_end, outcome in outcomes.items():
        assert outcome.code == "ok", f"{front_end}: {outcome}"
        assert outcome.output["text"] == text, front_end
        assert outcome.output["usage"] == [5, 2, 7], front_end
    assert_same(outcomes, ask)


async def test_a_lone_surrogate_in_a_unary_response_is_replaced_over_all_front_ends(
    clients: Mapping[str, Driver], keys: Keys, upstream: FaultUpstream
) -> None:
    prompt = "odd complete answer"
    upstream.when(prompt, complete("Hi \ud83d and \ud83d\ude00"))
    ask = TaskRequest(text_body(prompt), keys.live)
    outcomes = await ask_all(clients, ask)
    assert_same(outcomes, ask)
    for outcome in outcomes.values():
        assert outcome.output["text"] == "Hi \ufffd and 😀"
        assert outcome.output["usage"] == [5, 2, 7]


@pytest.mark.parametrize("front_end", ["rest", "remote"])
async def test_no_client_ends_a_line_within_an_event(
    front_end: str,
    clients: Mapping[str, Driver],
    keys: Keys,
    upstream: FaultUpstream,
    http: aiohttp.ClientSession,
) -> None:
    prompt = f"line separators, {front_end}"
    upstream.when(prompt, UNUSUAL["line separators"][0])
    client = clients[front_end]
    assert isinstance(client, RestDriver)
    headers = {"Authorization": f"Bearer {keys.live}"}
    body = text_body(prompt, stream=True)
    async with http.post(f"{client.base}/api/v1/task", json=body, headers=headers) as response:
        lines = [line for line in (await response.text()).splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    texts = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(texts) == UNUSUAL["line separators"][1]


@pytest.mark.parametrize("response_format", [None, "b64_json", "url"])
async def test_a_large_image_in_a_stream_is_a_link_unless_base64_is_requested_over_all_front_ends(
    response_format: str | None, clients: Mapping[str, Driver], keys: Keys
) -> None:
    body = {"model": "flux-1-pro", "prompt": "A kite", "width": 2048, "height": 2048}
    more = {"response_format": response_format} if response_format else {}
    ask = TaskRequest(body | more, keys.test, stream=True)
    outcomes = await ask_all(clients, ask)
    assert_same(outcomes, ask)
    for outcome in outcomes.values():
        size = int(outcome.output["inline" if response_format == "b64_json" else "linked"].split()[0])
        assert size > 48 * 1024
        assert ("inline" in outcome.output) == (response_format == "b64_json")
        assert ("linked" in outcome.output) == (response_format != "b64_json")
