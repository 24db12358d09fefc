"""The routes besides tasks: models, health checks, and paths that do not exist."""

from __future__ import annotations

import pytest
from yarl import URL

from gateway.routes import OPEN_ROUTES, OPENAI_ROUTES, ROUTES
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.telemetry.readiness import Readiness
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import HI, KEY, code_of, headers_of, raw_get


@pytest.mark.parametrize(
    "path",
    [
        *("/page", "/api/v2/task", "/api/v1/task/", "/media/", "/%00", "/api/v1/models/a/b"),
        *("/API/v1/models", "/api/v1/Models", "//api/v1/models", "/api//v1/models", "/api/v1/models/"),
    ],
)
async def test_an_unknown_path_is_a_json_error(gateway: GatewayApp, path: str) -> None:
    assert await code_of(gateway.http.get(gateway.url + path)) == (404, "not_found")
    wrong = {"Authorization": "Bearer wrong"}
    assert await code_of(gateway.http.get(gateway.url + path, headers=wrong)) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        *[
            (path, "/api/v1/task")
            for path in ("/api/v1/task/", "/API/v1/Task", "//api//v1/task", "/v1/task", "/task")
        ],
        *[(path, "/v1/chat/completions") for path in ("/chat/completions", "/api/v1/chat/completions")],
        ("/v1/Models/", "/v1/models"),
    ],
)
async def test_the_error_for_a_path_names_the_one_that_was_meant(
    gateway: GatewayApp, path: str, meant: str
) -> None:
    async with gateway.http.get(URL(gateway.url + path, encoded=True)) as response:
        assert response.status == 404
        assert (await response.json())["error"]["message"] == f"Not found. Use {meant}"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/api/v1/task", "POST"),
        ("GET", "/api/v1/task", "POST"),
        ("POST", "/openapi.json", "GET, HEAD"),
        ("PUT", "/healthz", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("OPTIONS", "/api/v1/task", "POST"),
        ("OPTIONS", "/api/v1/models", "GET, HEAD"),
    ],
)
async def test_another_method_is_a_json_error_with_the_allowed_ones(
    gateway: GatewayApp, method: str, path: str, allowed: str
) -> None:
    async with gateway.http.request(method, gateway.url + path) as response:
        assert response.headers["Allow"] == allowed
    assert await code_of(gateway.http.request(method, gateway.url + path)) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/models",
        "/api/v1/models/gpt-4",
        "/api/v1/account",
        "/api/v1/usage",
        "/openapi.json",
        "/healthz",
        "/",
        "/page/main.js",
    ],
)
async def test_head_gets_the_headers_of_get_without_the_body(gateway: GatewayApp, path: str) -> None:
    async with gateway.get(path) as response:
        expected = response.status, response.headers["Content-Type"], str(len(await response.read()))
    key = f"Authorization: Bearer {KEY}"
    asked = raw_get(path, key).replace(b"GET", b"HEAD") + raw_get("/nowhere", key, "Connection: close")
    head, _, rest = (await gateway.exchange(asked)).partition(b"\r\n\r\n")
    headers = headers_of(head)
    assert (int(head.split()[1]), headers["content-type"], headers["content-length"]) == expected
    assert rest.startswith(b"HTTP/1.1 404 ")  # no body came before the next response


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/models"),
        ("GET", "/api/v1/models/gpt-4"),
        ("GET", "/api/v1/account"),
        ("POST", "/api/v1/task"),
    ],
)
async def test_a_query_parameter_that_a_path_does_not_take_is_named(
    gateway: GatewayApp, method: str, path: str
) -> None:
    body = HI if method == "POST" else None
    for query, status in (("?stream=true&x=1", 400), ("?%66oo", 400), ("?", 200), ("?&", 200)):
        url = URL(f"{gateway.url}{path}{query}", encoded=True)
        async with gateway.http.request(method, url, headers=gateway.headers, json=body) as response:
            answer = await response.json()
            assert response.status == status
        if status == 400:
            name = "stream" if "stream" in query else "foo"
            message = f"Unknown query parameter: {name}. This path takes no parameters"
            assert (answer["error"]["code"], answer["error"]["message"]) == ("invalid_parameter", message)


@pytest.mark.parametrize(
    ("escaped", "name"), [("a%2Fb", "a/b"), ("a%252Fb", "a%2Fb"), ("a%2525", "a%25"), ("%C3%A9%20b", "é b")]
)
async def test_the_name_of_a_model_in_a_path_is_decoded_once(
    gateway: GatewayApp, escaped: str, name: str
) -> None:
    url = URL(f"{gateway.url}/api/v1/models/{escaped}", encoded=True)
    async with gateway.http.get(url, headers=gateway.headers) as response:
        assert (await response.json())["error"]["message"].endswith(f": {name}")


async def test_models_are_listed_with_limits_and_prices(gateway: GatewayApp) -> None:
    async with gateway.get("/api/v1/models") as response:
        listed = await response.json()
    assert listed["object"] == "list"
    by_name = {m["id"]: m for m in listed["data"]}
    assert len(by_name) == 14
    assert by_name["gpt-3.5-turbo"]["price"] == {
        "million_input_tokens": "0.1",
        "million_cached_input_tokens": "0.01",
        "million_cache_write_input_tokens": "0.125",
        "million_output_tokens": "0.5",
    }
    (tier,) = by_name["gpt-3.5-turbo"]["price_tiers"]
    assert tier["from_input_tokens"] == 272_001
    assert tier["price"]["million_cached_input_tokens"] == "0.02"
    assert "price_tiers" not in by_name["claude-3-opus"]
    types = {"text", "image", "text-to-speech", "speech-to-speech", "speech-to-text"}
    assert {m["type"] for m in listed["data"]} == types
    async with gateway.get("/api/v1/models/flux-1-dev") as response:
        assert await response.json() == by_name["flux-1-dev"]
    assert await code_of(gateway.http.get(f"{gateway.url}/api/v1/models")) == (401, "invalid_api_key")
    for unknown in ("nope", "%ff%fe"):
        assert await code_of(gateway.get(f"/api/v1/models/{unknown}")) == (400, "unsupported_model")


async def test_no_route_leaves_a_call_in_flight(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_calls=1)) as gateway:
        for path, status in (
            *[
                (path, 200)
                for method, path in (*ROUTES, *OPENAI_ROUTES)
                if method == "GET" and "{" not in path
            ],
            *[(path, 200) for path in OPEN_ROUTES if "{" not in path],
            *(("/api/v1/models/gpt-4", 200), ("/v1/models/nope", 404), ("/media/nope", 404), ("/nope", 404)),
            *(("/api/v1/account?a=b", 400), ("/api/v1/task", 405)),
        ):
            for _ in range(2):
                async with gateway.get(path) as response:
                    assert (path, response.status) == (path, status)


async def test_health_needs_no_key_and_reports_draining(open_gateway: OpenApp) -> None:
    readiness = Readiness()
    async with open_gateway(readiness=readiness) as gateway:
        async with gateway.http.get(f"{gateway.url}/healthz") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok"})
        async with gateway.http.head(f"{gateway.url}/healthz") as response:
            assert response.status == 200
        readiness.drain()
        assert await code_of(gateway.http.get(f"{gateway.url}/healthz")) == (503, "shutting_down")
