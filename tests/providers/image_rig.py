"""Helpers for the tests of image providers: jobs, and functions that run and check them."""

from __future__ import annotations

import socket
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import psutil  # type: ignore[import-untyped]

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, fit_hook, fit_job
from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.client import Http, Timeouts

KEY = "key-canary-2718"
PROMPT = "my canary prompt"
SECRETS = f"{KEY} {PROMPT} <b>body</b>"
PNG, JPEG, WEBP = b"\x89PNG", b"\xff\xd8\xff", b"RIFF"


def job(route: Route, image_input: ImageInput | None = None, *, stream: bool = False) -> Job[Any]:
    """An image job; with the shortest input by default."""
    model = Model(
        name="flux-1-pro",
        task_type=TaskType.TASK_TYPE_IMAGE,
        routes=(route,),
        limits=Limits(max_characters=10_000),
        prices=Prices({PriceUnit.PRICE_UNIT_IMAGE: 1}),
        price_version="test",
    )
    return Job("img_1", model, route, image_input or ImageInput(prompt=PROMPT), stream, deadline=1e12)


def largest_input(file_format: ImageFormat.ValueType = ImageFormat.IMAGE_FORMAT_WEBP) -> ImageInput:
    """An image input with all fields."""
    return ImageInput(
        prompt="Ünïcödé 🍊 on a table",
        width=1001,
        height=700,
        num_inference_steps=3,
        guidance_scale=2.5,
        seed=2**53 - 1,
        output_format=file_format,
    )


@asynccontextmanager
async def open_provider(
    provider_class: Callable[..., Any],
    base_url: str,
    *,
    key: str | None = KEY,
    limits: Timeouts | None = None,
    origins: tuple[str, ...] = (),
    **options: Any,
) -> AsyncIterator[Any]:
    """A provider, called at `base_url`."""
    async with Http(limits, origins=origins) as http:
        provider = provider_class(Credentials(key, base_url), http, **options)
        try:
            yield provider
        finally:
            await provider.aclose()


async def events(provider: Any, image_job: Job[Any]) -> list[Event]:
    """All events of the provider."""
    async with aclosing(provider.image(fit_job(image_job, fit_hook(provider, "image")))) as answer:
        return [event async for event in answer]


async def draw_image(provider: Any, image_job: Job[Any]) -> tuple[bytes, str]:
    """The image and its media type; it came last and only."""
    *earlier, last = await events(provider, image_job)
    assert all(event.HasField("image_progress") for event in earlier)
    assert image_job.stream or not earlier
    (image,) = last.result.image.images
    return image.data, image.content_type


async def failure(provider: Any, image_job: Job[Any]) -> UpstreamError:
    """The error that the job ends with; nothing looked like an image before."""
    try:
        async with aclosing(provider.image(fit_job(image_job, fit_hook(provider, "image")))) as answer:
            async for event in answer:
                assert event.HasField("image_progress"), "a failed task had an image"
    except UpstreamError as error:
        return error
    raise AssertionError("no failure")


def check_no_secrets(error: BaseException) -> None:
    """Nothing of the key, the prompt or the vendor's words is in the message or in a log of the error."""
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__)
    for secret in (KEY, PROMPT, "canary", "<b>", "sig="):
        assert secret not in shown


def listener() -> socket.socket:
    """A socket that takes connections, to see whether any comes."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(5)
    listening.setblocking(False)
    return listening


def was_connected(listening: socket.socket) -> bool:
    """Whether a connection was made."""
    try:
        listening.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def connections_to(port: int) -> int:
    """Returns the number of this process's open connections to a port."""
    mine = psutil.Process().net_connections("tcp")
    return sum(bool(c.raddr) and c.raddr.port == port and c.status == "ESTABLISHED" for c in mine)
