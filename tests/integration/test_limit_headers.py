"""The headers that report the limits of a plan, over all protocols, in answers and errors."""

from __future__ import annotations

import re
import time
from typing import Any

import grpc
import pytest

from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from tests.app import RICH, RunningApp, app_fixture
from tests.calls import as_dict, bearer, upload_messages
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, REST_PROTOCOL, Outcome
from tests.tasks import TASK_BODIES, text_body

REQUESTS = {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"}
TOKENS = {"x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"}
CONCURRENCY = {"x-ratelimit-limit-concurrent", "x-ratelimit-remaining-concurrent"}
ALWAYS = REQUESTS | CONCURRENCY | {"x-credits-remaining", "x-request-id", "x-pomelo-mode"}

app = app_fixture()


def check(outcome: Outcome, *, tokens: bool, mode: str = "test") -> None:
    """Asserts that an answer has every header of a plan with all limits."""
    names = ALWAYS | (TOKENS if tokens else set())
    assert names <= set(outcome.headers), names - set(outcome.headers)
    assert tokens or not TOKENS & set(outcome.headers)
    headers = outcome.headers
    assert headers["x-pomelo-mode"] == mode
    assert headers["x-ratelimit-limit"] == "1000"
    assert 0 <= int(headers["x-ratelimit-remaining"]) <= 1000
    assert time.time() - 1 <= int(headers["x-ratelimit-reset"]) <= time.time() + 61
    assert headers["x-ratelimit-limit-concurrent"] == "50"
    assert 0 <= int(headers["x-ratelimit-remaining-concurrent"]) <= 50
    assert re.fullmatch(r"\d+(\.\d{1,6})?", headers["x-credits-remaining"])
    if tokens:
        assert headers["x-ratelimit-limit-tokens"] == "100000"
        assert 0 < int(headers["x-ratelimit-remaining-tokens"]) <= 100_000
        assert time.time() - 1 <= int(headers["x-ratelimit-reset-tokens"]) <= time.time() + 61


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("task_type", TASK_BODIES)
async def test_answers_of_every_task_type_have_all_headers(
    app: RunningApp, task_type: str, protocol: str, stream: bool
) -> None:
    account = await app.account("all")
    outcome = await app.ask(protocol, account.test, TASK_BODIES[task_type], stream=stream)
    assert outcome.code == "ok"
    check(outcome, tokens=task_type == "text")
    if protocol == "grpc" and stream:
        left = RICH - (await app.records(account))[0].cost
        assert outcome.trailers["x-credits-remaining"] == f"{left / 10**6:.6f}".rstrip("0").rstrip(".")
        assert outcome.trailers["x-ratelimit-remaining-concurrent"] == "50"
        assert float(outcome.trailers["x-credits-charged"]) > 0
    elif not stream:
        assert float(outcome.headers["x-credits-charged"]) > 0
        assert outcome.headers["x-ratelimit-remaining-concurrent"] == "50"
        assert outcome.headers["x-ratelimit-remaining"] == "999"


@REST_PROTOCOL
@pytest.mark.parametrize("task_type", ["image", "tts", "sts"])
async def test_raw_media_has_all_headers(app: RunningApp, task_type: str, protocol: str) -> None:
    account = await app.account("all")
    outcome = await app.ask(protocol, account.test, TASK_BODIES[task_type], accept="image/*, audio/*")
    assert outcome.status == 200
    assert outcome.content
    check(outcome, tokens=False)
    if task_type == "image":  # it is sent whole, after the task has been settled
        assert outcome.headers["x-ratelimit-remaining-concurrent"] == "50"
        assert outcome.headers["x-credits-charged"] == "0.04"


@REST_PROTOCOL
async def test_a_stream_of_one_event_has_the_headers_of_a_settled_task(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("all")
    outcome = await app.ask(protocol, account.test, TASK_BODIES["stt"], stream=True)
    assert outcome.done
    assert outcome.headers["x-ratelimit-remaining-concurrent"] == "50"
    assert float(outcome.headers["x-credits-charged"]) > 0


ERRORS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "a missing field": ({"model": "gpt-4"}, "missing_parameter", True),
    "a wrong field": (text_body(temperature=9), "invalid_parameter", True),
    "a wrong field of an image": ({**TASK_BODIES["image"], "width": 5}, "invalid_parameter", False),
    "an unknown model": (text_body(model="gpt-99"), "unsupported_model", False),
    "a trigger": (text_body("[[error:content_policy_violation]]"), "content_policy_violation", True),
    "a provoked 503": (text_body("[[error:provider_unavailable]]"), "provider_unavailable", True),
    "failing speech": (TASK_BODIES["tts"] | {"text": "[[error:provider_failed]]"}, "provider_failed", False),
}


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_has_all_headers(app: RunningApp, name: str, protocol: str, stream: bool) -> None:
    body, code, tokens = ERRORS[name]
    account = await app.account("all")
    outcome = await app.ask(protocol, account.test, body, stream=stream)
    assert outcome.code == code
    check(outcome, tokens=tokens)
    assert outcome.metadata["x-credits-remaining"] == "1000000", "a refusal costs nothing"
    assert outcome.metadata["x-ratelimit-remaining-concurrent"] == "50"
    assert outcome.metadata.get("x-credits-charged", "0") == "0"
    unavailable = outcome.status == 503 or (protocol == "grpc" and code == "provider_unavailable")
    assert ("retry-after" in outcome.headers) == unavailable


@REST_PROTOCOL
async def test_an_error_of_the_gateway_has_all_headers(app: RunningApp, protocol: str) -> None:
    account = await app.account("all")
    for data, content_type, status in (
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"x", "text/plain", 415),
        (b" " * 9_000_000, "application/json", 413),
        (b"--x--", "multipart/form-data; boundary=x", 400),
    ):
        headers = {"Content-Type": content_type}
        answer = await app.post(protocol, account.test, data=data, headers=headers)
        assert answer.status == status
        check(Outcome(headers={k.lower(): v for k, v in answer.headers.items()}), tokens=False)


@PROTOCOL
async def test_a_list_of_models_has_all_headers(app: RunningApp, protocol: str) -> None:
    account = await app.account("all")
    check(await app.get(protocol, account.test, "/api/v1/models"), tokens=False)


@REST_PROTOCOL
async def test_a_model_that_is_requested_with_a_wrong_header_has_its_limits(
    app: RunningApp, protocol: str
) -> None:
    key = (await app.account("all")).test
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "two words"}
    for name, tokens in (("gpt-4", True), ("flux-1-pro", False), ("nope", False)):
        async with app.session.get(f"{app.urls[protocol]}/v1/models/{name}", headers=headers) as answer:
            assert answer.status == 400
            assert "Idempotency-Key" in (await answer.json())["error"]["message"]
            sent = {header.lower() for header in answer.headers}
        assert sent >= ALWAYS
        assert (sent >= TOKENS) == tokens


@REST_PROTOCOL
async def test_other_resources_have_all_headers(app: RunningApp, protocol: str) -> None:
    account = await app.account("all")
    check(await app.get(protocol, account.live, "/api/v1/models/gpt-4"), tokens=True, mode="live")
    check(await app.get(protocol, account.test, "/api/v1/models/flux-1-pro"), tokens=False)
    missing = await app.get(protocol, account.test, "/media/media_nothing.png")
    assert missing.status == 404
    check(missing, tokens=False)
    unknown = await app.get(protocol, account.test, "/api/v1/models/gpt-99")
    assert unknown.code == "unsupported_model"
    check(unknown, tokens=False)


@REST_PROTOCOL
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/api/v2/task", 404), ("GET", "/api/v1/task", 405), ("POST", "/api/v1/usage", 405)],
)
async def test_a_path_or_method_that_does_not_exist_has_all_headers(
    app: RunningApp, protocol: str, method: str, path: str, status: int
) -> None:
    account = await app.account("all")
    headers = {"Authorization": f"Bearer {account.test}"}
    async with app.session.request(method, app.urls[protocol] + path, headers=headers) as answer:
        assert answer.status == status
        assert ("Allow" in answer.headers) == (status == 405)
    check(Outcome(headers={k.lower(): v for k, v in answer.headers.items()}), tokens=False)
    for key, expected in (("pml_test_junk", 401), (None, status)):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with app.session.request(method, app.urls[protocol] + path, headers=headers) as answer:
            assert answer.status == expected
            assert "X-Credits-Remaining" not in answer.headers


async def test_a_method_of_grpc_that_does_not_exist_has_all_headers(app: RunningApp) -> None:
    account = await app.account("all")
    call = app.channel.unary_unary("/pomelo.v1.TaskService/Nothing")(b"", metadata=bearer(account.test))
    assert await call.code() == grpc.StatusCode.UNIMPLEMENTED
    check(Outcome(headers=as_dict(await call.trailing_metadata())), tokens=False)


async def test_an_upload_has_all_headers(app: RunningApp) -> None:
    account = await app.account("all")
    messages = iter(upload_messages(b"some audio", "audio/mpeg"))
    call = MediaServiceStub(app.channel).UploadMedia(messages, metadata=bearer(account.test))
    await call
    check(Outcome(headers=as_dict(await call.trailing_metadata())), tokens=False)


@PROTOCOL_AND_STREAM
async def test_a_plan_without_limits_has_no_limit_headers(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account("unlimited")
    for body in (text_body(), text_body(temperature=9), TASK_BODIES["image"]):
        outcome = await app.ask(protocol, account.test, body, stream=stream)
        assert not [name for name in outcome.metadata if name.startswith("x-ratelimit")]
        assert "x-credits-remaining" in outcome.headers
        assert outcome.headers["x-pomelo-mode"] == "test"


@PROTOCOL
async def test_an_unauthenticated_caller_gets_no_account_headers(app: RunningApp, protocol: str) -> None:
    outcome = await app.ask(protocol, "pml_test_junk", text_body())
    assert outcome.code == "invalid_api_key"
    assert not [n for n in outcome.metadata if n.startswith(("x-ratelimit", "x-credits", "x-pomelo"))]


@REST_PROTOCOL
async def test_a_link_is_not_a_call_of_the_key_beside_it(app: RunningApp, protocol: str) -> None:
    account = await app.account("all")
    (link,) = (await app.ask(protocol, account.test, TASK_BODIES["image"])).links
    for url, status in ((link, 200), (f"{link}x", 404)):
        async with app.session.get(url, headers={"Authorization": f"Bearer {account.test}"}) as response:
            assert response.status == status
            assert not ALWAYS - {"x-request-id"} & {name.lower() for name in response.headers}


@REST_PROTOCOL
@pytest.mark.parametrize("path", ["/api/v1/models/{name}", "/v1/models/{id}", "/api/v1/account"])
async def test_the_limits_of_a_resource_are_described(app: RunningApp, protocol: str, path: str) -> None:
    account = await app.account("all")
    described = await app.get_json(protocol, account.test, "/openapi.json")
    url = app.urls[protocol] + re.sub("{.+}", "gpt-4", path)
    async with app.session.get(url, headers={"Authorization": f"Bearer {account.test}"}) as response:
        assert response.status == 200
        sent = {name for name in response.headers if name.startswith("X-RateLimit")}
    headers = described["paths"][path]["get"]["responses"]["200"]["headers"]
    assert sent == {name for name in headers if name.startswith("X-RateLimit")}
