"""Requests of the BFL provider, and its handling of delivered images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog, Route
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.providers.bfl import BFL
from pomelo.testing import Gate
from pomelo.testing.bfl_protocol import Drawing, delivered, status
from pomelo.testing.images import make_image
from tests.providers.image_rig import draw_image, job, largest_input
from tests.providers.rig import KEY, PROMPT, Rig, open_provider, open_rig, read_all

SIDE = (256.0, 1440.0, 32.0)
DEV = Route(
    "bfl",
    "flux-dev",
    clamp={"width": SIDE, "height": SIDE, "num_inference_steps": (1, 50, 0), "guidance_scale": (1.5, 5, 0)},
)
PRO = Route(
    "bfl",
    "flux-pro-1.1",
    drop=frozenset(("num_inference_steps", "guidance_scale")),
    clamp={"width": SIDE, "height": SIDE},
)
NOW: dict[str, Any] = {"interval": 0.001}


@pytest.fixture(name="rig")
async def _rig() -> AsyncIterator[Rig]:
    async with open_rig(BFL, "bfl", **NOW) as rig:
        yield rig


@pytest.mark.parametrize(
    ("reported", "dollars"),
    [
        (4.0, Decimal("0.04")),
        (2.9, Decimal("0.029")),
        (3, Decimal("0.03")),
        (None, None),
        ("4", "4"),
        (True, True),
    ],
)
async def test_the_cost_of_an_order_is_reported_in_dollars(
    rig: Rig, reported: Any, dollars: Any, stream: bool
) -> None:
    rig.script(Drawing(order={"cost": reported}))
    image_job = job(PRO, stream=stream)
    await draw_image(rig.provider, image_job)
    assert image_job.report.cost == dollars


def progress(answer: list[Any]) -> list[float]:
    """Returns the reported progress."""
    return [event.image_progress.progress for event in answer if event.HasField("image_progress")]


async def test_the_largest_request_is_exactly_this(rig: Rig) -> None:
    await draw_image(rig.provider, job(DEV, largest_input()))
    order = rig.requests[0]
    assert (order.method, order.target) == ("POST", "/bfl/v1/flux-dev")
    assert order.body == {
        "prompt": "Ünïcödé 🍊 on a table",
        "width": 992,
        "height": 704,
        "steps": 3,
        "guidance": 2.5,
        "seed": 2**53 - 1,
        "safety_tolerance": 2,
        "output_format": "webp",
    }
    assert order.headers["x-key"] == KEY
    assert "Authorization" not in order.headers


async def test_the_smallest_request_has_only_size_format_and_tolerance(rig: Rig) -> None:
    await draw_image(rig.provider, job(PRO))
    assert rig.requests[0].body == {
        "prompt": PROMPT,
        "width": 1024,
        "height": 1024,
        "safety_tolerance": 2,
        "output_format": "png",
    }


async def test_a_route_drops_clamps_and_sets_the_tolerance(rig: Rig) -> None:
    image_input = ImageInput(prompt="x", width=64, height=2048, num_inference_steps=100, guidance_scale=0)
    await draw_image(rig.provider, job(PRO, image_input))
    pro = rig.requests[0].body
    assert pro.keys().isdisjoint(("steps", "guidance"))
    assert (pro["width"], pro["height"]) == (256, 1440)
    route = Route("bfl", "flux-dev", clamp=DEV.clamp, options={"safety_tolerance": 0})
    rig.reset()
    await draw_image(rig.provider, job(route, image_input))
    dev = rig.requests[0].body
    assert (dev["steps"], dev["guidance"], dev["safety_tolerance"]) == (50, 1.5, 0)


def test_the_tolerance_of_a_route_is_one_that_the_vendor_has() -> None:
    assert [BFL.options(safety_tolerance=each).safety_tolerance for each in (0, 6)] == [0, 6]
    for tolerance in (-1, 7):
        with pytest.raises(ValueError, match="safety_tolerance"):
            BFL.options(safety_tolerance=tolerance)


@pytest.mark.parametrize("name", ["flux-1-pro", "flux-1-dev"])
async def test_a_models_row_of_the_catalogue_overrides_the_caller(rig: Rig, name: str) -> None:
    route = next(r for r in Catalog.load().by_any_name[name].routes if r.provider == "bfl")
    for image_input in (
        largest_input(),
        ImageInput(prompt="x", width=64, height=64, num_inference_steps=1, guidance_scale=0, seed=0),
        ImageInput(prompt="x", width=2048, height=2048, num_inference_steps=100, guidance_scale=20),
    ):
        await draw_image(rig.provider, job(route, image_input))


async def test_polls_have_the_key_and_the_download_does_not(rig: Rig) -> None:
    rig.script(Drawing(polls=(status("Pending"),)))
    await draw_image(rig.provider, job(DEV))
    order, *questions, download = rig.requests
    assert order.method == "POST"
    assert [question.headers["x-key"] for question in questions] == [KEY, KEY]
    assert all(question.target.startswith("/bfl/v1/get_result?id=") for question in questions)
    assert download.path.startswith("/bfl/delivery/")
    assert KEY not in str(dict(download.headers))
    assert download.target.endswith("?se=2026&sig=a%2Bb%2F%3D"), "a signature was rewritten"


async def test_an_image_has_the_content_type_of_its_bytes(rig: Rig) -> None:
    rig.script(Drawing(delivery=(delivered(make_image("jpeg"), "application/octet-stream"),)))
    assert (await draw_image(rig.provider, job(DEV)))[1] == "image/jpeg"


async def test_a_stream_reports_progress_that_never_falls(rig: Rig) -> None:
    reported = (
        None,
        0.25,
        0.1,
        0.25,
        0.5,
        -3,
        0.75,
        "much",
        True,
        float("nan"),
        float("inf"),
        -(10**400),
        10**400,
    )
    polls = tuple(status("Pending", progress=value) for value in reported)  # type: ignore[arg-type]
    rig.script(Drawing(polls=polls))
    answer = await read_all(rig.provider, job(DEV, stream=True))
    assert progress(answer) == [0, 0.25, 0.5, 0.75, 1]
    assert answer[-1].HasField("completed")
    rig.script(Drawing(polls=polls))
    assert progress(await read_all(rig.provider, job(DEV, stream=False))) == []


async def test_progress_is_reported_while_the_vendor_works(rig: Rig) -> None:
    gate = Gate()
    held = status("Generating", progress=0.5, before=(gate,))
    rig.script(Drawing(polls=(status("Pending", progress=0.2), held)))
    async with aclosing(rig.provider.image(job(DEV, stream=True))) as answer:
        assert (await anext(answer)).image_progress.progress == 0
        assert (await anext(answer)).image_progress.progress == 0.2
        gate.open()
        assert (await anext(answer)).image_progress.progress == 0.5


@pytest.mark.parametrize(
    "word", ["Pending", "Reasoning", "Generating", "Queued", "A New One", "Task not found", ""]
)
async def test_a_task_continues_in_any_state_that_is_not_final(rig: Rig, word: str) -> None:
    rig.script(Drawing(polls=(status(word),) * 3))
    await draw_image(rig.provider, job(DEV))
    assert len(rig.requests) == 6


async def test_the_vendor_is_not_polled_more_often_than_the_interval(rig: Rig) -> None:
    rig.script(Drawing(polls=(status("Pending"),) * 4))
    async with open_provider(BFL, rig.bfl_base_url, interval=0.02) as provider:
        await draw_image(provider, job(DEV))
    times = [received.at for received in rig.requests[:-1]]
    assert all(later - earlier >= 0.019 for earlier, later in pairwise(times))


async def test_concurrent_images_do_not_mix(rig: Rig) -> None:
    sizes = range(32, 52)
    for size in sizes:
        rig.when(
            f"n{size}.", Drawing(polls=(status("Pending"),), delivery=(delivered(make_image("png", size)),))
        )

    async def ask(size: int) -> None:
        data, _ = await draw_image(rig.provider, job(DEV, ImageInput(prompt=f"n{size}.")))
        assert data == make_image("png", size)

    async with asyncio.TaskGroup() as group:
        for size in sizes:
            group.create_task(ask(size))
