"""The played vendors of images: strict with requests, and read by the vendors' own clients."""

from __future__ import annotations

from base64 import b64decode
from typing import Any, cast

import pytest

from pomelo.testing import FaultUpstream
from pomelo.testing.bfl_protocol import Drawing, moderated, status
from pomelo.testing.images import make_image
from pomelo.testing.replicate_protocol import Prediction, prediction
from pomelo.testing.replicate_protocol import error_reply as replicate_error
from pomelo.testing.together_protocol import error_reply as together_error
from tests.providers.rig import KEY, ask


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_images_are_valid(name: str) -> None:
    import io

    import av

    with av.open(io.BytesIO(make_image(name, 48, 32))) as open_provider:
        frame: Any = next(cast("Any", open_provider).decode(video=0))
        assert (frame.width, frame.height) == (48, 32)
        plane = frame.reformat(format="rgb24").planes[0]
        red, green, blue = bytes(plane)[plane.line_size * 16 + 24 * 3 :][:3]
        assert red > 200
        assert 90 < green < 170
        assert blue < 90


# --- Black Forest Labs

GOOD = {"prompt": "a red kite", "width": 1024, "height": 768}
BFL = {"x-key": KEY}


async def test_bfl_accepts_an_order_answers_polls_and_delivers(upstream: FaultUpstream) -> None:
    upstream.script(Drawing(polls=(status("Pending"), status("Generating", progress=0.5))))
    _, order = await ask("POST", upstream.bfl_base_url + "/v1/flux-dev", json=GOOD, headers=BFL)
    states = [(await ask("GET", order["polling_url"], headers=BFL))[1] for _ in range(4)]
    assert [state["status"] for state in states] == ["Pending", "Generating", "Ready", "Ready"]
    assert states[0].keys() >= {"id", "status", "result", "progress", "details", "preview"}
    code, data = await ask("GET", states[-1]["result"]["sample"])
    assert (code, data) == (200, make_image("jpeg"))
    code, body = await ask("GET", upstream.bfl_base_url + "/v1/get_result?id=other", headers=BFL)
    assert (code, body) == (404, {"detail": "Task not found"})


async def test_bfl_tasks_keep_to_their_scripts(upstream: FaultUpstream) -> None:
    upstream.script(Drawing(polls=(moderated(),), done=False), Drawing())
    url = upstream.bfl_base_url + "/v1/flux-pro-1.1"
    first, second = [(await ask("POST", url, json=GOOD, headers=BFL))[1] for _ in range(2)]
    assert (await ask("GET", second["polling_url"], headers=BFL))[1]["status"] == "Ready"
    assert (await ask("GET", first["polling_url"], headers=BFL))[1]["status"] == "Content Moderated"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"prompt": ""}, "prompt"),
        ({"width": 1000}, "width"),
        ({"height": 224}, "height"),
        ({"width": 1472}, "width"),
        ({"width": "1024"}, "width"),
        ({"steps": 51}, "steps"),
        ({"guidance": 1}, "guidance"),
        ({"seed": 1.5}, "seed"),
        ({"safety_tolerance": 7}, "safety_tolerance"),
        ({"output_format": "gif"}, "output_format"),
        ({"num_inference_steps": 4}, "num_inference_steps"),
    ],
)
async def test_bfl_names_the_field_that_it_refuses(
    upstream: FaultUpstream, change: dict[str, Any], name: str
) -> None:
    url = upstream.bfl_base_url + "/v1/flux-dev"
    code, body = await ask("POST", url, json=GOOD | change, headers=BFL)
    assert (code, body["detail"][0]["loc"]) == (422, ["body", name])


async def test_bfl_refuses_unknown_paths_and_requests_without_a_key(upstream: FaultUpstream) -> None:
    base = upstream.bfl_base_url
    for method, path, headers, expected in (
        ("POST", "/v1/flux-dev", {}, 403),
        ("POST", "/v1/flux-dev", {"x-key": "wrong"}, 403),
        ("POST", "/v1/flux-dev", {"Authorization": f"Bearer {KEY}"}, 403),
        ("GET", "/v1/get_result?id=1", {}, 403),
        ("GET", "/v1/get_result", BFL, 422),
        ("POST", "/v1/flux-schnell", BFL, 404),
        ("GET", "/v1/flux-dev", BFL, 405),
        ("POST", "/v1/get_result", BFL, 405),
        ("GET", "/delivery/x.png", BFL, 400),
        ("GET", "/delivery/x.png", {"Authorization": "Bearer x"}, 400),
        ("GET", "/delivery/x.png", {}, 404),
        ("POST", "/delivery/x.png", {}, 405),
    ):
        body = {"json": GOOD} if method == "POST" else {}
        assert (await ask(method, base + path, headers=headers, **body))[0] == expected, (method, path)
    assert (await ask("POST", base + "/v1/flux-dev", json=GOOD | {"steps": 4}, headers=BFL))[0] == 200
    code, _ = await ask("POST", base + "/v1/flux-pro-1.1", json=GOOD | {"steps": 4}, headers=BFL)
    assert code == 422


# --- Together

TOGETHER = {"Authorization": f"Bearer {KEY}"}
SCHNELL = {"model": "black-forest-labs/FLUX.1-schnell", "prompt": "a red kite"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model": ""}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"steps": 5}, "steps"),
        ({"output_format": "webp"}, "output_format"),
        ({"response_format": "b64_json"}, "response_format"),
        ({"num_inference_steps": 4}, "num_inference_steps"),
        ({"reference_images": "x"}, "reference_images"),
    ],
)
async def test_together_names_the_field_that_it_refuses(
    upstream: FaultUpstream, change: dict[str, Any], name: str
) -> None:
    url = upstream.together_base_url + "/v1/images/generations"
    code, body = await ask("POST", url, json=SCHNELL | change, headers=TOGETHER)
    assert (code, body["error"]["param"]) == (400, name)


async def test_together_refuses_unknown_paths_and_requests_without_a_key(upstream: FaultUpstream) -> None:
    url = upstream.together_base_url + "/v1/images/generations"
    assert (await ask("POST", url, json=SCHNELL))[0] == 401
    assert (await ask("POST", url, json=SCHNELL, headers={"Authorization": "Bearer wrong"}))[0] == 401
    assert (await ask("GET", url, headers=TOGETHER))[0] == 405
    assert (await ask("POST", url, data=b"{}", headers=TOGETHER))[0] == 415
    assert (await ask("POST", url, json=[], headers=TOGETHER))[0] == 400
    assert (await ask("POST", url + "/x", json=SCHNELL, headers=TOGETHER))[0] == 404


async def test_togethers_own_client_reads_answers_and_refusals(upstream: FaultUpstream) -> None:
    together = pytest.importorskip("together")
    async with together.AsyncTogether(
        api_key=KEY, base_url=upstream.together_base_url, max_retries=0
    ) as client:
        answer = await client.images.generate(
            model=SCHNELL["model"],
            prompt="a red kite",
            steps=4,
            width=512,
            height=512,
            seed=7,
            n=1,
            response_format="base64",
            output_format="png",
        )
        assert answer.data[0].type == "b64_json"
        assert b64decode(answer.data[0].b64_json) == make_image("png")
        upstream.script(together_error(429), together_error(402))
        with pytest.raises(together.RateLimitError):
            await client.images.generate(**SCHNELL)
        with pytest.raises(together.APIStatusError):
            await client.images.generate(**SCHNELL)


# --- Replicate

REPLICATE = {"Authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"aspect_ratio": "2:1"},
        {"megapixels": "2"},
        {"megapixels": 1},
        {"num_inference_steps": 5},
        {"output_format": "jpeg"},
        {"go_fast": 1},
        {"width": 512},
    ],
)
async def test_replicate_names_the_field_that_it_refuses(
    upstream: FaultUpstream, change: dict[str, Any]
) -> None:
    url = upstream.replicate_base_url + "/v1/models/black-forest-labs/flux-schnell/predictions"
    body = {"input": {"prompt": "a red kite"} | change}
    code, answer = await ask("POST", url, json=body, headers=REPLICATE)
    assert (code, answer["invalid_fields"][0]["field"]) == (422, f"input.{next(iter(change))}")


async def test_replicate_refuses_unknown_paths_and_requests_without_a_key(upstream: FaultUpstream) -> None:
    base = upstream.replicate_base_url
    good = {"json": {"input": {"prompt": "x"}}}
    url = base + "/v1/models/black-forest-labs/flux-schnell/predictions"
    assert (await ask("POST", url, **good))[0] == 401
    assert (await ask("POST", url, headers={"Authorization": "Bearer wrong"}, **good))[0] == 401
    assert (await ask("GET", url, headers=REPLICATE))[0] == 405
    assert (await ask("POST", url, data=b"{}", headers=REPLICATE))[0] == 415
    assert (await ask("POST", url, json={"prompt": "x"}, headers=REPLICATE))[0] == 422
    for prefer, expected in (("wait", 201), ("wait=60", 201), ("wait=61", 422), ("respond-async", 422)):
        assert (await ask("POST", url, headers=REPLICATE | {"Prefer": prefer}, **good))[0] == expected
    assert (await ask("POST", url, json=good["json"] | {"more": 1}, headers=REPLICATE))[0] == 422
    assert (await ask("POST", url.replace("schnell", "other"), headers=REPLICATE, **good))[0] == 404
    assert (await ask("GET", base + "/v1/predictions/other", headers=REPLICATE))[0] == 404
    delivery = base + "/delivery/x"
    assert (await ask("GET", delivery, headers=REPLICATE))[0] == 400
    assert (await ask("GET", delivery))[0] == 404


async def test_replicates_own_client_reads_answers_and_refusals(
    upstream: FaultUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicate = pytest.importorskip("replicate")
    monkeypatch.setenv("REPLICATE_POLL_INTERVAL", "0.01")
    client = replicate.Client(api_token=KEY, base_url=upstream.replicate_base_url)
    name = "black-forest-labs/flux-schnell"
    image_input = {"prompt": "a red kite", "output_format": "png"}
    (file,) = await client.async_run(name, input=image_input)
    assert str(file).endswith(".png")
    assert (await ask("GET", str(file)))[1] == make_image("png")
    upstream.script(Prediction(polls=(prediction("processing"),)))
    (file,) = await client.async_run(name, input=image_input, wait=False)
    assert str(file).endswith(".png")
    upstream.script(Prediction(polls=(prediction("failed", error="It broke"),)))
    with pytest.raises(replicate.exceptions.ModelError):
        await client.async_run(name, input=image_input, wait=False)
    upstream.script(Prediction(polls=(prediction("starting"),), done=False))
    running = await client.models.predictions.async_create(name, input=image_input, wait=False)
    await running.async_cancel()
    assert running.status == "canceled"
    upstream.script(replicate_error(422, "It can't be taken", ("seed",)))
    with pytest.raises(replicate.exceptions.ReplicateError) as raised:
        await client.async_run(name, input=image_input)
    assert raised.value.status == 422
