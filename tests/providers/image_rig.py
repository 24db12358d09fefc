"""Jobs for the tests of image providers, and functions that run and check them."""

from __future__ import annotations

import socket
from contextlib import aclosing
from typing import Any

import psutil

from pomelo.catalog.catalog import Limits, Route
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.providers.base import Job
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.testing import FaultUpstream, Script
from tests.providers.rig import PROMPT, Rig, check_no_secrets, make_job, read_all, run

PNG, JPEG, WEBP = b"\x89PNG", b"\xff\xd8\xff", b"RIFF"
NEVER, NEXT, SAME = RetryPolicy.NEVER, RetryPolicy.NEXT_ROUTE, RetryPolicy.SAME_ROUTE


def job(route: Route, image_input: ImageInput | None = None, *, stream: bool = False) -> Job[Any]:
    """An image job; with the shortest input by default."""
    return make_job(
        TaskType.TASK_TYPE_IMAGE,
        route,
        image_input or ImageInput(prompt=PROMPT),
        stream=stream,
        limits=Limits(max_characters=10_000),
    )


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


async def draw_image(provider: Any, image_job: Job[Any]) -> tuple[bytes, str]:
    """The image and its media type; it came last and only."""
    *earlier, last = await read_all(provider, image_job)
    assert all(event.HasField("image_progress") for event in earlier)
    assert image_job.stream or not earlier
    (image,) = last.completed.image.images
    return image.data, image.content_type


async def failure(provider: Any, image_job: Job[Any]) -> UpstreamError:
    """The error that the job ends with; nothing looked like an image before."""
    try:
        async with aclosing(run(provider, image_job)) as answer:
            async for event in answer:
                assert event.HasField("image_progress"), "a failed task had an image"
    except UpstreamError as error:
        return error
    raise AssertionError("no failure")


async def check_refused(
    rig: Rig, script: Script, image_job: Job[Any], code: str, wait: int | None, retry: RetryPolicy
) -> None:
    """The job to whose request the vendor replies with `script` fails so; it is sent once."""
    rig.script(script)
    error = await failure(rig.provider, image_job)
    assert (error.code, error.retry_after, error.retry) == (code, wait, retry)
    check_no_secrets(error)
    assert len(rig.requests) == 1, "it was sent twice"


def orders(vendor: FaultUpstream) -> int:
    """Returns the number of orders."""
    return sum(received.method == "POST" for received in vendor.requests)


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
