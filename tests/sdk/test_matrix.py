"""Clients of OpenAI's API do the same with Pomelo, unchanged: each feature of each client, in the sandbox and with
played vendors.

A client for Node.js makes all its checks in one process, whose results the tests read.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pomelo.accounts.failed_keys import FailedKeys
from pomelo.accounts.plans import Plan
from pomelo.testing import Answer, Stop, error_reply
from tests import node_client
from tests.app import PLANS, Account, RunningApp, app_fixture
from tests.sdk.expected import CHECKS, CODES, question
from tests.sdk.matrix import CASES, CLIENTS, PAGE, TARGETS, page
from tests.sdk.python_clients import Target
from tests.sdk.sdk import PNG
from tests.sdk.setup import BUSY, SCRIPTS, SENTENCES, TEXT, BusyFirst, Setup, answer, reports
from tests.web_server import serve_application

pytestmark = pytest.mark.filterwarnings("ignore")  # LangChain and LiteLLM warn about pydantic

plans = {"one": Plan("one", concurrent=1), "no tokens": Plan("no tokens", tokens=1)}
app = app_fixture(plans={**PLANS, **plans}, observers=[reports], failed_keys=FailedKeys(limit=10**6))


@pytest.fixture(name="modules", scope="module")
def _modules(request: pytest.FixtureRequest) -> Path:
    """The packages of the clients for Node.js."""
    return node_client.install(Path(request.config.cache.mkdir("node")), SCRIPTS)


@pytest.fixture(name="setup", scope="module")
async def _setup(app: RunningApp) -> AsyncIterator[Setup]:
    upstream = app.upstream
    upstream.default = answer
    upstream.when(BUSY, BusyFirst())
    upstream.when("[[error:provider_failed]]", error_reply(401, code="invalid_api_key"))
    upstream.when("[[cut]]", Answer("one two three four", at={2: Stop.CLOSE}))
    account, poor = await app.account(), await app.account(test=0, live=0)
    one_model = await app.account(models=("gpt-3.5-turbo",))
    no_tokens = await app.account("no tokens")
    audio = base64.b64encode(await _speech(app, account.test)).decode()

    def key(account: Account, mode: str) -> str:
        return account.live if mode == "live" else account.test

    targets: dict[str, Target] = {}
    setup = Setup(app, targets)

    async def act(request: web.Request) -> web.Response:
        slot = setup.slots[request.match_info["place"]]
        await (slot.hold() if request.match_info["act"] == "hold" else slot.release())
        return web.Response()

    control = web.Application()
    control.router.add_post("/{place}/{act}", act)
    async with serve_application(control) as url:
        for name in TARGETS:
            protocol, mode = name.split("-")
            failures: dict[str, dict[str, Any]] = {
                "field": {"temperature": 3},
                "key": {"key": f"pml_{mode}_x"},
                "credits": {"key": key(poor, mode)},
                "model": {"key": key(one_model, mode)},
                "limit": {"key": key(no_tokens, mode)},
                "provider": {"prompt": "[[error:provider_failed]]"},
                "cut": {"prompt": "[[words:40]] [[cut]]", "stream": True},
            }
            if mode == "test":
                failures |= {
                    name: {"prompt": f"[[error:{CODES[name]}]]"}
                    for name in ("conflict", "mismatch", "deadline")
                }
            targets[name] = Target(
                name=name,
                url=f"{app.urls[protocol]}/v1",
                key=key(account, mode),
                text=TEXT,
                audio=audio,
                pixel=PNG,
                failures=failures,
                retry_key="",
                retry_prompt="",
                control=url,
            )
        yield setup
        await setup.aclose()


async def _speech(app: RunningApp, key: str) -> bytes:
    """Returns the text as the sandbox speaks it."""
    headers = {"Authorization": f"Bearer {key}", "Accept": "audio/*"}
    body = {"model": "eleven-labs-tts", "text": TEXT, "voice": "alloy"}
    async with app.session.post(f"{app.urls['rest']}/api/v1/task", json=body, headers=headers) as spoken:
        return await spoken.read()


@pytest.fixture(autouse=True, scope="module")
def _no_prices_of_litellm() -> Iterator[None]:
    """It would fetch prices from the internet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield


async def result_of(
    setup: Setup, client: str, feature: str, target: str, request: pytest.FixtureRequest
) -> Any:
    """Returns what a check returned."""
    if CLIENTS[client].script:
        modules = request.getfixturevalue("modules")  # only here: without npm the others are not skipped
        result, *error = (await setup.of_node(client, modules))[feature, target]
        assert not error, error[0]
        return result
    check = getattr(await setup.of_python(client, target), feature)
    return await (check(question(client, target)) if feature == "vision" else check())


@pytest.mark.parametrize(("client", "feature", "target"), CASES)
async def test_a_client_of_openais_api_works_unchanged(
    setup: Setup, client: str, feature: str, target: str, request: pytest.FixtureRequest
) -> None:
    CHECKS[feature](await result_of(setup, client, feature, target, request), setup, client, target)


def test_the_page_has_the_table_of_what_is_tested() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.sdk.matrix"


@pytest.mark.parametrize("target", TARGETS)
async def test_openais_sdk_for_javascript_makes_media_in_every_form(
    setup: Setup, target: str, request: pytest.FixtureRequest
) -> None:
    found = await result_of(setup, "node", "media", target, request)
    assert found["sameImage"]
    assert found["streamed"] == [["image_generation.completed", "png", "256x288"]]
    start = "ID3" if target.endswith("test") else "\xff\xfb\x90"
    assert (found["audio"], found["wav"]) == (start, "RIFF")
    transcripts = found["transcripts"]
    assert transcripts["json"]["text"] == transcripts["verbose_json"]["text"] == TEXT
    assert transcripts["text"] == TEXT + "\n"
    assert [each["text"] for each in transcripts["diarized_json"]["segments"]] == SENTENCES
    assert transcripts["srt"].startswith("1\n00:00:00,000 --> 00:00:0")
    assert transcripts["vtt"].startswith("WEBVTT\n\n00:00:00.000 --> 00:00:0")
    assert (found["words"], found["segments"]) == (TEXT, SENTENCES)
    assert found["events"] == [
        {"type": "transcript.text.delta", "delta": TEXT},
        {"type": "transcript.text.done", "text": TEXT},
    ]
    assert [(each["name"], each["code"], each["param"]) for each in found["failures"]] == [
        ("BadRequestError", "invalid_parameter", "size"),
        ("BadRequestError", "missing_parameter", "input"),
        ("BadRequestError", "invalid_parameter", "model"),
        ("AuthenticationError", "invalid_api_key", None),
        ("BadRequestError", "unsupported_model", "model"),
        ("NotFoundError", "model_not_found", "model"),
    ]
    assert all(each["hasId"] for each in found["failures"])
