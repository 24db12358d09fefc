"""REST answers, byte for byte as they were recorded: status, headers and body.

A change of the engine or of the protobuf contract must not change them. After an intended change of REST,
record them again with RECORD_REST=1, and read the difference.
"""

from __future__ import annotations

import hashlib
import os
import re
from difflib import unified_diff
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.app import RunningApp, app_fixture
from tests.parity.test_parity import CASES, Case

RECORDED = Path(__file__).with_name("recorded_answers.txt")
NOW = 1_800_000_000.0
_LONGEST = 600
"""Bytes of a body above which its length and digest are recorded."""

_VARIABLE = (
    (re.compile(r"\b(task|img|speech|req|media|page)_[\w-]+(\.\w+)?"), r"\1_…"),
    (re.compile(r"http://127\.0\.0\.1:\d+"), "http://HOST"),
    (re.compile(r"&sig=[\w-]+"), "&sig=…"),
    (re.compile(r'"(processing_ms|first_byte_ms)":\d+'), r'"\1":…'),
    (re.compile(r"account-\d+"), "ACCOUNT"),
    (re.compile(r"Reset at [\d:TZ-]+"), "Reset at …"),
    # Encoders may differ by version and processor; other tests compare their output.
    (re.compile(r'("b64_json":"[\w+/]{8})[\w+/=]{100,}"'), r'\1…"'),
    (re.compile(r'"key_id":"\w+"'), '"key_id":"…"'),
)
_USUAL_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Length": "…",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Content-Type": "application/json",
    "Date": "…",
    "Server": "pomelo",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-Pomelo-Mode": "test",
    "X-Request-ID": "req_…",
}
"""What most answers have, each once. A difference from them is recorded, and the other headers."""

_GROUPS = ("X-Credits-", "X-RateLimit-")
"""The headers that begin so are in one line."""

_VARIABLE_HEADERS = {"Date", "X-RateLimit-Reset", "X-RateLimit-Reset-Tokens"}
_OTHER_REQUESTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("models", "GET /api/v1/models", {}),
    ("one model", "GET /api/v1/models/gpt-4", {}),
    ("an unknown model", "GET /api/v1/models/nothing", {}),
    ("account", "GET /api/v1/account", {}),
    ("usage", "GET /api/v1/usage", {}),
    ("usage with an unknown parameter", "GET /api/v1/usage?colour=red", {}),
    ("the OpenAPI description", "GET /openapi.json", {}),
    ("health", "GET /healthz", {}),
    ("an unknown path", "GET /api/v1/nothing", {}),
    ("another method", "GET /api/v1/task", {}),
    ("no JSON", "POST /api/v1/task", {"data": b"{", "headers": {"Content-Type": "application/json"}}),
    ("another content type", "POST /api/v1/task", {"data": b"a=1", "headers": {"Content-Type": "text/plain"}}),
    ("raw image", "POST /api/v1/task", {"json": {"model": "flux-1-pro", "prompt": "A kite", "width": 96, "height": 64}, "headers": {"Accept": "image/*"}}),
    ("raw speech", "POST /api/v1/task", {"json": {"model": "eleven-labs-tts", "text": "Hello", "voice": "adam", "output_format": "wav_16000"}, "headers": {"Accept": "audio/*"}}),
    ("a strict request", "POST /api/v1/task", {"json": {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}], "stop": "x"}, "headers": {"Prefer": "handling=strict"}}),
)  # fmt: skip


def normalize(text: str) -> str:
    """Replaces what differs in each run."""
    for pattern, replacement in _VARIABLE:
        text = pattern.sub(replacement, text)
    return text


async def describe(answer: aiohttp.ClientResponse) -> str:
    """A response as text: status, sorted headers without the usual ones, and the body or its digest."""
    body = await answer.read()
    has_media = answer.content_type.startswith(("image/", "audio/"))
    text = normalize("media" if has_media else body.decode())
    variable = _VARIABLE_HEADERS | ({"Content-Length"} if answer.content_length == len(body) else set())
    headers = [
        (name, "…" if name in variable else normalize(value))
        for name, value in sorted(answer.headers.items())
    ]
    usual = {
        name for name, value in _USUAL_HEADERS.items() if [v for n, v in headers if n == name] == [value]
    }
    own = [f"{n}: {v}" for n, v in headers if n not in usual and not n.startswith(_GROUPS)]
    own += [f"without {name}" for name in _USUAL_HEADERS if name not in answer.headers]
    for group in _GROUPS:
        if members := [f"{n.removeprefix(group)}: {v}" for n, v in headers if n.startswith(group)]:
            own.append(f"{group.removesuffix('-')}: {', '.join(members)}")
    if len(text) > _LONGEST:
        text = f"{len(text)} characters {hashlib.sha256(text.encode()).hexdigest()}"
    return "\n".join([f"{answer.status} {answer.reason}", *own, text.strip()]) + "\n"


running = app_fixture(now=lambda: NOW)


def recorded() -> dict[str, str]:
    """The recorded answers, by the names of their requests."""
    parts = re.split(r"^=== (.+)\n", RECORDED.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


async def ask(running: RunningApp, protocol: str, method_and_path: str, key: str, **options: Any) -> str:
    """The answer to a request with an API key (empty: without one)."""
    method, path = method_and_path.split(" ")
    headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {key}"} if key else {})
    url = running.urls[protocol] + path
    async with running.session.request(method, url, headers=headers, **options) as answer:
        return await describe(answer)


async def ask_case(running: RunningApp, protocol: str, case: Case) -> str:
    """The answer to a request of the parity cases."""
    account = await running.account("all", models=("claude-3-haiku",) if case.key == "only_haiku" else ())
    key = {"none": "", "junk": "pml_test_junk", "live": account.live}.get(case.key, account.test)
    headers = {"X-Request-Timeout": str(case.timeout)} if case.timeout is not None else {}
    if case.request_id:
        headers["X-Request-Id"] = case.request_id
    body = {**case.body, "stream": True} if case.stream else case.body
    return await ask(running, protocol, "POST /api/v1/task", key, json=body, headers=headers)


async def answers(running: RunningApp, protocol: str) -> dict[str, str]:
    """The answers to all requests, by their names. A revoked and an expired key are those of the session's app;
    a gateway whose server stops at a deadline before it knows the key has no limits to send."""
    cases = [
        case
        for case in CASES
        if case.key not in ("revoked", "expired") and not case.name.startswith("deadline that has passed")
    ]
    found = {case.name: await ask_case(running, protocol, case) for case in cases}
    for name, request, options in _OTHER_REQUESTS:
        key = (await running.account("all")).test
        found[name] = await ask(running, protocol, request, key, **options)
    return found


@pytest.mark.parametrize("protocol", ["rest", "remote"])
async def test_every_answer_is_the_recorded_one(running: RunningApp, protocol: str) -> None:
    found = await answers(running, protocol)
    if os.environ.get("RECORD_REST") and protocol == "rest":
        RECORDED.write_text("".join(f"=== {name}\n{answer}\n" for name, answer in found.items()))
    expected = {name: answer.strip() for name, answer in recorded().items()}
    assert found.keys() == expected.keys()
    different = [
        line
        for name, answer in found.items()
        for line in unified_diff(expected[name].splitlines(), answer.strip().splitlines(), name, name, n=0)
    ]
    assert different == [], "\n".join(different)
