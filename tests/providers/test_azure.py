"""Azure OpenAI as a host, by the rows of docs/catalogue.md."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomelo.catalog.catalog import Model
from pomelo.providers import Credentials
from pomelo.providers.chat.compatible import Compatible
from pomelo.providers.http.client import Http
from pomelo.providers.registry import read_registry
from pomelo.settings import SettingsError, load
from pomelo.testing import FaultUpstream, Received, Reply, VendorProtocol, openai_protocol, plain_refusal
from pomelo.testing.text_answer import DONE, token_counts
from tests.docs.blocks import ROOT
from tests.providers.rig import KEY, SECRETS, check_no_secrets, read_all
from tests.providers.text_rig import COMPATIBLE, check_last, failure, hi, text

ROWS = re.search(r"```toml\n(\[hosts\.azure\].*?)```", (ROOT / "docs/catalogue.md").read_text(), re.DOTALL)
PATH = "/openai/v1/chat/completions"
SAFE = {"hate": {"filtered": False, "severity": "safe"}}


def answer(received: Received) -> Reply:
    """An answer with the results of the content filter."""
    usage = token_counts(9, 2) | {"completion_tokens_details": {"reasoning_tokens": 0}}
    if not received.body.get("stream"):
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "Hi there",
            "refusal": None,
            "annotations": [],
        }
        choice = {"index": 0, "message": message, "finish_reason": "stop", "content_filter_results": SAFE}
        body = {"object": "chat.completion", "choices": [choice], "usage": usage}
        return Reply(steps=(json.dumps(body | {"prompt_filter_results": [{"prompt_index": 0}]}).encode(),))
    first = {"id": "", "object": "", "created": 0, "model": "", "choices": []}
    chunks: list[dict[str, Any]] = [first | {"prompt_filter_results": [{"prompt_index": 0}]}]
    deltas: tuple[dict[str, Any], ...] = (
        {"role": "assistant", "content": ""},
        {"content": "Hi"},
        {"content": " there"},
        {},
    )
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        chunks.append({"object": "chat.completion.chunk", "choices": [choice], "usage": None})
    offsets = {"check_offset": 9, "start_offset": 0, "end_offset": 8}
    late = {
        "index": 0,
        "finish_reason": None,
        "content_filter_results": SAFE,
        "content_filter_offsets": offsets,
    }
    chunks.append({"object": "", "choices": [late]})  # of the asynchronous filter
    chunks.append({"object": "chat.completion.chunk", "choices": [], "usage": usage})
    steps = [b"data: %s\n\n" % json.dumps(each).encode() for each in chunks]
    return Reply(headers={"Content-Type": "text/event-stream"}, steps=(*steps, DONE))


def refused(received: Received, api_key: str | None) -> Reply | None:
    """A refusal of a request without the key, or with fields that OpenAI does not take."""
    if received.headers.get("Authorization") != f"Bearer {api_key}":
        return plain_refusal(401, "Access denied due to invalid subscription key")
    body = received.body | {"model": "gpt-5.6-sol"}
    return openai_protocol.refused(replace(received, path=openai_protocol.PATH, body=body), api_key)


AZURE = VendorProtocol("azure", lambda received: received.target == PATH, refused, answer)


@pytest.fixture
async def upstream() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream(api_key=KEY, protocols=[AZURE]) as server:
        yield server


@pytest.fixture(name="model")
def _model(tmp_path: Path) -> Model:
    """The model of the page."""
    assert ROWS is not None
    (tmp_path / "catalog.toml").write_text(ROWS[1])
    return read_registry(tmp_path / "catalog.toml", plugins=[]).catalog.models["our-gpt"]


@pytest.fixture(name="provider")
async def _provider(upstream: FaultUpstream, tmp_path: Path, model: Model) -> AsyncIterator[Any]:
    registry = read_registry(tmp_path / "catalog.toml", plugins=[])
    assert registry.entries["azure"].base_url.endswith(".openai.azure.com/openai/v1")
    async with Http() as http:
        made = registry.entries["azure"].make(Credentials(KEY, f"{upstream.url}/openai/v1"), http)
        assert isinstance(made, Compatible)
        yield made


async def test_a_deployment_answers(
    upstream: FaultUpstream, provider: Any, model: Model, stream: bool
) -> None:
    job = COMPATIBLE.job(
        hi(max_tokens=9, temperature=1, seed=1), stream=stream, route=model.routes[0], user="ann"
    )
    events = await read_all(provider, job)
    assert text(events) == "Hi there"
    check_last(events, 9, 2)
    (received,) = upstream.requests
    assert received.body["model"] == "the-name-of-the-deployment"
    assert received.body["max_completion_tokens"] == 9


async def test_a_prompt_that_the_content_filter_refuses_is_against_the_policy(
    upstream: FaultUpstream, provider: Any, model: Model, stream: bool
) -> None:
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": SAFE}
    error = {"message": SECRETS, "type": None, "param": "prompt", "code": "content_filter", "status": 400}
    upstream.script(Reply(400, steps=(json.dumps({"error": error | {"innererror": inner}}).encode(),)))
    failed, _ = await failure(provider, COMPATIBLE.job(stream=stream, route=model.routes[0]))
    assert failed.code == "content_policy_violation"
    check_no_secrets(failed)


@pytest.mark.parametrize("end", ["/openai/deployments/x?api-version=2024-10-21", "/v1?", "/v1#x"])
def test_a_base_url_has_no_query_to_which_paths_would_be_appended(end: str) -> None:
    with pytest.raises(SettingsError, match=r"^AZURE_BASE_URL: must have no \? and no #: paths are appended"):
        load(None, {"AZURE_BASE_URL": f"https://r.openai.azure.com{end}"}).provider("azure")


def test_the_rows_of_the_page_are_those_of_the_built_in_models() -> None:
    assert ROWS is not None
    ours = tomllib.loads(ROWS[1])["models"]["our-gpt"]["routes"][0]
    built_in = tomllib.loads((ROOT / "pomelo/catalog/catalog.toml").read_text())["models"]["gpt-4"]["routes"][
        0
    ]
    for key in ("max_tokens_field", "reasoning_effort", "reasoning_excludes", "drop"):
        assert ours[key] == built_in[key]
