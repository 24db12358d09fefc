"""Requests, answers and failures of the Replicate provider."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.providers.base import VENDOR_CALL, VendorCall, fit_job
from pomelo.providers.errors import RetryPolicy
from pomelo.providers.replicate import Replicate
from pomelo.testing import FaultUpstream, Reply, Script, Stop, page
from pomelo.testing.bfl_protocol import delivered
from pomelo.testing.images import make_image
from pomelo.testing.replicate_protocol import Prediction, error_reply, prediction
from tests.providers.image_rig import (
    NEVER,
    NEXT,
    check_refused,
    draw_image,
    failure,
    job,
    largest_input,
    listener,
    orders,
    was_connected,
)
from tests.providers.rig import KEY, PROMPT, SECRETS, Rig, check_no_secrets, open_provider, open_rig, read_all
from tests.waiting import cancel, until

SCHNELL = Route(
    "replicate",
    "black-forest-labs/flux-schnell",
    drop=frozenset(("guidance_scale",)),
    clamp={"num_inference_steps": (1, 4, 0)},
)
NOW: dict[str, Any] = {"interval": 0.001}


@pytest.fixture(name="rig")
async def _rig() -> AsyncIterator[Rig]:
    async with open_rig(Replicate, "replicate", **NOW) as rig:
        yield rig


async def test_the_largest_request_is_exactly_this(rig: Rig) -> None:
    await draw_image(rig.provider, job(SCHNELL, largest_input()))
    order = rig.requests[0]
    path = "/replicate/v1/models/black-forest-labs/flux-schnell/predictions"
    assert (order.method, order.target) == ("POST", path)
    assert order.body == {
        "input": {
            "prompt": "Ünïcödé 🍊 on a table",
            "aspect_ratio": "3:2",
            "megapixels": "1",
            "num_outputs": 1,
            "output_format": "webp",
            "num_inference_steps": 3,
            "seed": 2**53 - 1,
            "go_fast": False,
        }
    }
    assert order.headers["Authorization"] == f"Bearer {KEY}"
    assert order.headers["Prefer"] == "wait=5"


async def test_the_smallest_request_leaves_the_rest_to_the_model(rig: Rig) -> None:
    await draw_image(rig.provider, job(SCHNELL))
    assert rig.requests[0].body == {
        "input": {
            "prompt": PROMPT,
            "aspect_ratio": "1:1",
            "megapixels": "1",
            "num_outputs": 1,
            "output_format": "png",
        }
    }


@pytest.mark.parametrize(
    ("width", "height", "aspect", "megapixels"),
    [
        (1024, 1024, "1:1", "1"),
        (1920, 1080, "16:9", "1"),
        (1080, 1920, "9:16", "1"),
        (2048, 64, "21:9", "0.25"),
        (64, 2048, "9:21", "0.25"),
        (1000, 800, "5:4", "1"),
        (800, 1000, "4:5", "1"),
        (1024, 768, "4:3", "1"),
        (768, 1024, "3:4", "1"),
        (512, 512, "1:1", "0.25"),
        (700, 700, "1:1", "0.25"),
        (720, 720, "1:1", "1"),
        (64, 64, "1:1", "0.25"),
        (2048, 2048, "1:1", "1"),
        # Nearest as a factor: the middle of two ratios is that of their logarithms.
        (2046, 1000, "21:9", "1"),
        (986, 2000, "9:16", "1"),
    ],
)
async def test_a_size_becomes_the_nearest_aspect_ratio_and_area(
    rig: Rig, width: int, height: int, aspect: str, megapixels: str
) -> None:
    await draw_image(rig.provider, job(SCHNELL, ImageInput(prompt="x", width=width, height=height)))
    image_input = rig.requests[0].body["input"]
    assert (image_input["aspect_ratio"], image_input["megapixels"]) == (aspect, megapixels)


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        ({"height": 1920}, [("height", "1344")]),
        ({"width": 1920}, [("width", "1344")]),
        ({"width": 1216, "height": 832}, []),
        ({}, []),
    ],
)
async def test_a_side_that_the_caller_set_is_reported_if_it_is_adjusted(
    rig: Rig, given: dict[str, Any], reported: list[tuple[str, str]]
) -> None:
    image_job = fit_job(job(SCHNELL, ImageInput(prompt="x", **given)), rig.provider.fit_image)
    assert [(change.field, change.used) for change in image_job.adjustments] == reported


async def test_a_prediction_in_the_first_response_needs_no_poll(rig: Rig) -> None:
    await draw_image(rig.provider, job(SCHNELL))
    order, download = rig.requests
    assert order.method == "POST"
    assert KEY not in str(dict(download.headers))


async def test_a_slow_prediction_is_polled_until_it_has_succeeded(rig: Rig) -> None:
    states = ("starting", "processing", "a new one")
    rig.script(Prediction(polls=tuple(prediction(state) for state in states)))
    answer = await read_all(rig.provider, job(SCHNELL, stream=True))
    assert [event.image_progress.progress for event in answer[:-1]] == [0, 1]
    _, *questions, download = rig.requests
    assert len(questions) == 4
    assert {question.headers["Authorization"] for question in questions} == {f"Bearer {KEY}"}
    assert "Authorization" not in download.headers


async def test_an_output_may_be_one_url(rig: Rig) -> None:
    async with FaultUpstream() as store:
        store.default = delivered(make_image("webp"))
        url = store.url + "/replicate/delivery/x"
        for output in (url, [url]):
            rig.script(Prediction(output=output))
            async with open_provider(
                Replicate, rig.replicate_base_url, **NOW, origins=(store.url,)
            ) as provider:
                assert (await draw_image(provider, job(SCHNELL)))[0] == make_image("webp")
        assert all(KEY not in str(dict(received.headers)) for received in store.requests)


REFUSED_ORDERS: list[tuple[Script, str, int | None, RetryPolicy]] = [
    (error_reply(422, SECRETS, ("seed",)), "invalid_parameter", None, NEVER),
    (error_reply(422, SECRETS, ("go_fast",)), "provider_failed", None, NEXT),
    (Reply(steps=(b'{"status":"starting"}',)), "provider_failed", None, NEVER),
    (Reply(steps=(b'{"status":"starting","urls":[]}',)), "provider_failed", None, NEVER),
]


@pytest.mark.parametrize(("script", "code", "wait", "retry"), REFUSED_ORDERS)
async def test_an_order_that_fails_is_mapped_to_an_error_and_sent_once(
    rig: Rig, script: Script, code: str, wait: int | None, retry: RetryPolicy, stream: bool
) -> None:
    await check_refused(rig, script, job(SCHNELL, stream=stream), code, wait, retry)


ENDS: list[tuple[Script, str]] = [
    (prediction("failed", error=SECRETS), "provider_failed"),
    (prediction("failed", error="NSFW content detected in all outputs."), "content_policy_violation"),
    (prediction("failed", error="The input was flagged as sensitive. (E005)"), "content_policy_violation"),
    (prediction("failed", error={"not": "a text"}), "provider_failed"),
    (prediction("canceled"), "provider_failed"),
    (prediction("aborted"), "provider_failed"),
    (prediction("succeeded"), "provider_failed"),
    (prediction("succeeded", output=[]), "provider_failed"),
    (prediction("succeeded", output={"a": 1}), "provider_failed"),
    (prediction("succeeded", output=["https://127.0.0.1/x.png"]), "provider_failed"),
    (prediction("succeeded", output=["data:image/png;base64,AAAA"]), "provider_failed"),
    (prediction("succeeded", output="data:image/png,abc"), "provider_failed"),
    (prediction("succeeded", output="data:image/png;base64,@@@@"), "provider_failed"),
    (prediction("succeeded", output="data:"), "provider_failed"),
    (prediction("succeeded", output="data:;base64,"), "provider_failed"),
    (prediction("starting", status=None), "provider_failed"),
]


@pytest.mark.parametrize("immediate", [False, True], ids=["later", "immediately"])
@pytest.mark.parametrize(("reply", "code"), ENDS)
async def test_a_prediction_that_fails_is_mapped_to_an_error_and_ordered_once(
    rig: Rig, reply: Script, code: str, immediate: bool, stream: bool
) -> None:
    rig.script(reply if immediate else Prediction(polls=(prediction("processing"), reply), done=False))
    error = await failure(rig.provider, job(SCHNELL, stream=stream))
    assert (error.code, error.retry) == (code, NEVER), "a retry would place a second order"
    check_no_secrets(error)
    assert orders(rig) == 1


async def test_a_failing_poll_is_repeated_and_a_refusal_is_not(rig: Rig) -> None:
    rig.script(Prediction(polls=(error_reply(429), page(502), Reply(before=(Stop.RESET,)))))
    await draw_image(rig.provider, job(SCHNELL))
    final = error_reply(503, headers={"x-should-retry": "false"})
    for refusal, code in ((error_reply(401), "provider_failed"), (final, "provider_unavailable")):
        rig.reset()
        rig.script(Prediction(polls=(refusal,)))
        error = await failure(rig.provider, job(SCHNELL))
        assert (error.code, error.retry) == (code, NEVER)
        assert len(rig.requests) == 2


async def test_a_prediction_that_does_not_exist_yet_is_polled_again(rig: Rig) -> None:
    rig.script(Prediction(polls=(error_reply(404),) * 4))
    await draw_image(rig.provider, job(SCHNELL))
    rig.script(Prediction(polls=(error_reply(404),), done=False))
    async with open_provider(Replicate, rig.replicate_base_url, interval=0.001, grace=0.05) as hasty:
        error = await failure(hasty, job(SCHNELL))
    assert (error.code, error.retry) == ("provider_failed", NEVER)


DATA = "data:image/png;name=a.png;base64," + b64encode(make_image()).decode()


@pytest.mark.parametrize(
    "output", [DATA, [DATA], DATA.replace("data:", "DATA:"), DATA[:60] + "\n" + DATA[60:].rstrip("=")]
)
async def test_an_output_may_be_a_data_uri(rig: Rig, output: Any) -> None:
    rig.script(Prediction(output=output))
    assert await draw_image(rig.provider, job(SCHNELL)) == (make_image(), "image/png")
    assert len(rig.requests) == 1


async def test_the_key_is_not_sent_to_a_foreign_link(rig: Rig) -> None:
    with listener() as elsewhere:
        port = elsewhere.getsockname()[1]
        for url in (
            f"http://127.0.0.1:{port}/",
            f"https://localhost:{port}/",
            "https://api.replicate.com.evil.example/",
            "https://evilreplicate.com/",
            "http://api.replicate.com/v1/predictions/p1",
            7,
        ):
            rig.script(Prediction(polls=(prediction("starting"),), order={"urls": {"get": url}}))
            error = await failure(rig.provider, job(SCHNELL))
            assert (error.code, error.retry) == ("provider_failed", NEVER)
        assert not was_connected(elsewhere)


async def leave(provider: Any, rig: Rig, script: Script) -> None:
    """Leaves a prediction that is being polled."""
    rig.script(script)
    drawing = asyncio.create_task(draw_image(provider, job(SCHNELL)))
    await until(lambda: len(rig.requests) > 1)
    await cancel(drawing)


async def test_closing_the_provider_waits_until_a_prediction_is_cancelled(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.providers.images._CLOSE_TIMEOUT", 20.0)
    call = VendorCall()
    VENDOR_CALL.set(call)
    async with open_provider(Replicate, rig.replicate_base_url, **NOW) as provider:
        await leave(provider, rig, Prediction(polls=(prediction("starting"),), done=False))
    assert rig.requests[-1].path.endswith("/cancel")
    assert call.sent is not None
    assert "Content-Type" not in call.sent, "the last request of the call is a poll"


async def test_a_prediction_whose_reader_leaves_between_two_events_is_cancelled(rig: Rig) -> None:
    rig.script(Prediction(polls=(prediction("starting"),), done=False))
    events = rig.provider.image(job(SCHNELL, stream=True))
    assert (await anext(events)).image_progress.progress == 0
    await events.aclose()
    await until(lambda: rig.requests[-1].path.endswith("/cancel"))


async def test_the_key_is_not_sent_to_a_foreign_link_that_cancels(rig: Rig) -> None:
    with listener() as elsewhere:
        urls = {
            "get": f"{rig.replicate_base_url}/v1/predictions/p0",
            "cancel": f"http://127.0.0.1:{elsewhere.getsockname()[1]}/",
        }
        await leave(rig.provider, rig, Prediction(polls=(prediction("starting"),), order={"urls": urls}))
        await rig.provider.aclose()
        assert not was_connected(elsewhere)
