"""What holds for every image provider: failures, downloads, and callers who disconnect."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.providers import Credentials
from pomelo.providers.bfl import BFL
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Http
from pomelo.providers.http.downloads import MAX_FILE_BYTES
from pomelo.providers.images import DELIVERY_ERRORS
from pomelo.providers.replicate import Replicate
from pomelo.providers.together import Together
from pomelo.testing import Gate, Reply, Script, Stop, bfl_protocol, page, redirect, replicate_protocol
from pomelo.testing import together_protocol as together
from pomelo.testing.bfl_protocol import Drawing, delivered, status
from pomelo.testing.images import make_image
from pomelo.testing.replicate_protocol import Prediction, prediction
from tests.providers.image_rig import NEVER, NEXT, SAME, draw_image, failure, job, orders
from tests.providers.rig import (
    KEY,
    SECRETS,
    Rig,
    check_left,
    check_no_secrets,
    open_rig,
    read_all,
)
from tests.unit.providers.names import Names
from tests.waiting import cancel, until

NOW: dict[str, Any] = {"interval": 0.001}
PENDING = status("Pending")


@dataclass(frozen=True)
class Vendor:
    """A provider of images. `refuse` makes its vendor's refusal with a status; `order` is what its vendor does
    with an order, which is `pending` in between, and takes `requests` for an image. It can be cancelled if
    `cancels`."""

    name: str
    make: Callable[..., Any]
    route: Route
    refuse: Callable[[int], Reply]
    options: dict[str, Any] = field(default_factory=dict)
    order: Callable[..., Script] = Drawing
    pending: Script = PENDING
    requests: int = 3
    cancels: bool = False


BLACK_FOREST = Vendor(
    "bfl", BFL, Route("bfl", "flux-dev"), lambda code: bfl_protocol.error_reply(code, SECRETS), NOW
)
REPLICATE = Vendor(
    "replicate",
    Replicate,
    Route("replicate", "black-forest-labs/flux-schnell"),
    lambda code: replicate_protocol.error_reply(code, SECRETS),
    NOW,
    Prediction,
    prediction("starting"),
    requests=2,
    cancels=True,
)
TOGETHER = Vendor(
    "together",
    Together,
    Route("together", "black-forest-labs/FLUX.1-schnell"),
    lambda code: together.error_reply(code, message=SECRETS),
)
VENDORS = (BLACK_FOREST, REPLICATE, TOGETHER)
ORDERED = pytest.mark.parametrize(
    "vendor", [BLACK_FOREST, REPLICATE], ids=lambda vendor: vendor.name, indirect=True
)


@pytest.fixture(name="vendor", params=VENDORS, ids=lambda vendor: vendor.name)
def _vendor(request: pytest.FixtureRequest) -> Vendor:
    vendor: Vendor = request.param
    return vendor


@pytest.fixture(name="rig")
async def _rig(vendor: Vendor) -> AsyncIterator[Rig]:
    async with open_rig(vendor.make, vendor.name, **vendor.options) as rig:
        yield rig


@pytest.mark.parametrize("name", ["", "png", "jpeg", "webp"])
async def test_the_image_is_returned_unchanged_with_the_content_type_of_its_bytes(
    vendor: Vendor, rig: Rig, name: str
) -> None:
    wanted = ImageFormat.Value(f"IMAGE_FORMAT_{(name or 'unspecified').upper()}")
    answer = await draw_image(rig.provider, job(vendor.route, ImageInput(prompt="x", output_format=wanted)))
    written = "png" if not name or (name, vendor) == ("webp", TOGETHER) else name
    assert answer == (make_image(written), f"image/{written}")


REFUSED: list[tuple[Script | int, str, int | None, RetryPolicy]] = [
    *((code, "provider_failed", None, NEXT) for code in (400, 401, 402, 403, 404)),
    (413, "payload_too_large", None, NEVER),
    (429, "provider_unavailable", 5, SAME),
    (Reply(429, {"Retry-After": "17"}, steps=(b"{}",)), "provider_unavailable", 17, SAME),
    (500, "provider_unavailable", 5, NEVER),
    (503, "provider_unavailable", 5, NEVER),
    (page(502), "provider_unavailable", 5, NEVER),
    (page(524), "provider_unavailable", 5, NEVER),
    (page(), "provider_failed", None, NEVER),
    (redirect("/elsewhere"), "provider_failed", None, NEXT),
    (Reply(), "provider_failed", None, NEVER),
    (Reply(steps=(b"{}",)), "provider_failed", None, NEVER),
    (Reply(steps=(b"[]",)), "provider_failed", None, NEVER),
    (Reply(steps=(b"{", Stop.CLOSE)), "provider_failed", None, NEVER),
    (Reply(before=(Stop.CLOSE,)), "provider_unavailable", 5, NEVER),
    (Reply(before=(Stop.RESET,)), "provider_unavailable", 5, NEVER),
    (Reply(before=(b"SSH-2.0-OpenSSH_9\r\n\r\n", Stop.CLOSE)), "provider_failed", None, NEVER),
]


@pytest.mark.parametrize(("script", "code", "wait", "retry"), REFUSED)
async def test_an_order_that_fails_is_mapped_to_an_error_and_sent_once(
    vendor: Vendor,
    rig: Rig,
    script: Script | int,
    code: str,
    wait: int | None,
    retry: RetryPolicy,
    stream: bool,
) -> None:
    rig.script(vendor.refuse(script) if isinstance(script, int) else script)
    error = await failure(rig.provider, job(vendor.route, stream=stream))
    assert (error.code, error.retry_after, error.retry) == (code, wait, retry)
    check_no_secrets(error)
    assert len(rig.requests) == 1, "it was sent twice"


HUGE = b"\x89PNG\r\n\x1a\n" + b"x" * (1024 * 1024 - 8)
HALF = make_image()[:40]
UNDELIVERED: list[tuple[Script | int, str]] = [
    *((code, "provider_failed") for code in (403, 404, 410)),
    (page(), "provider_failed"),
    (page(503), "provider_unavailable"),
    (Reply(), "provider_failed"),
    (Reply(204), "provider_failed"),
    (redirect("/bfl/delivery/other"), "provider_failed"),
    (Reply(steps=(HALF, Stop.CLOSE)), "provider_failed"),
    (Reply(headers={"Content-Length": "99"}, steps=(HALF, Stop.RESET)), "provider_failed"),
    (Reply(headers={"Content-Encoding": "gzip"}, steps=(gzip.compress(make_image()),)), "provider_failed"),
    (Reply(headers={"Content-Length": str(MAX_FILE_BYTES + 1)}, steps=(HUGE, Gate())), "provider_failed"),
    (Reply(steps=(HUGE,) * 33), "provider_failed"),
    (Reply(steps=(b"GIF89a" + b"\0" * 99,)), "provider_failed"),
    (delivered(b"\x89PN"), "provider_failed"),
    (delivered(b"%PDF-1.7"), "provider_failed"),
    *((delivered(make_image(each)[:-2]), "provider_failed") for each in ("png", "jpeg", "webp")),
    (Reply(before=(Stop.RESET,)), "provider_unavailable"),
]


@ORDERED
@pytest.mark.parametrize(("script", "code"), UNDELIVERED)
async def test_an_image_that_is_not_delivered_is_a_failure_and_not_ordered_again(
    vendor: Vendor, rig: Rig, script: Script | int, code: str, stream: bool
) -> None:
    delivery = vendor.refuse(script) if isinstance(script, int) else script
    rig.script(vendor.order(delivery=(delivery,)))
    error = await failure(rig.provider, job(vendor.route, stream=stream))
    assert (error.code, error.retry) == (code, NEVER)
    check_no_secrets(error)
    assert orders(rig) == 1


@ORDERED
@pytest.mark.parametrize(
    "trouble",
    [
        Reply(steps=(HALF, Stop.CLOSE)),
        Reply(headers={"Content-Length": "99"}, steps=(HALF, Stop.RESET)),
        Reply(headers={"Content-Length": "99"}, steps=(HALF, Stop.CLOSE)),
        delivered(make_image()[:-1]),
        Reply(206, {"Content-Type": "image/png"}, (make_image()[:-1],)),
        Reply(before=(Stop.RESET,)),
        page(503),
        403,
        404,
    ],
)
async def test_a_download_that_fails_is_repeated_without_another_order(
    vendor: Vendor, rig: Rig, trouble: Reply | int, stream: bool
) -> None:
    failing = vendor.refuse(trouble) if isinstance(trouble, int) else trouble
    rig.script(vendor.order(delivery=(failing, failing, failing, delivered(make_image()))))
    assert (await draw_image(rig.provider, job(vendor.route, stream=stream)))[0] == make_image()
    assert orders(rig) == 1


@ORDERED
@pytest.mark.parametrize("stage", ["the order", "a question", "between questions", "the delivery"])
async def test_cancelling_closes_everything_immediately(vendor: Vendor, stage: str, stream: bool) -> None:
    gate = Gate()
    held = Reply(steps=(b"x", gate))
    stages = {
        "the order": held,
        "a question": vendor.order(polls=(vendor.pending, held)),
        "between questions": vendor.order(polls=(vendor.pending,), done=False),
        "the delivery": vendor.order(delivery=(held,)),
    }
    between = stage == "between questions"
    async with open_rig(vendor.make, vendor.name, interval=0.02 if between else 0.001) as rig:
        rig.script(stages[stage])
        task = asyncio.create_task(read_all(rig.provider, job(vendor.route, stream=stream)))
        if between:
            while len(rig.requests) < 3:
                await rig.received()
            await rig.requests[2].done.wait()
        else:
            await gate.reached.wait()
        since = asyncio.get_running_loop().time()
        await cancel(task)
        seen = len(rig.requests)
        if not between:
            await check_left(rig.requests[-1], since)
        if vendor.cancels and stage in ("a question", "between questions"):
            await until(lambda: len(rig.requests) > seen)
            cancelled = rig.requests[seen]
            assert cancelled.method == "POST"
            assert cancelled.path == f"{rig.requests[1].path}/cancel"
            assert cancelled.headers["Authorization"] == f"Bearer {KEY}"
            seen += 1
        # A complete new task runs, and no further request of the old one arrives.
        rig.script(vendor.order())
        await draw_image(rig.provider, job(vendor.route))
        assert len(rig.requests) == seen + vendor.requests


@pytest.mark.parametrize("make", [BFL, Replicate, Together])
async def test_closing_a_provider_closes_its_downloads(make: Any) -> None:
    names = Names(("10.0.0.1",))
    async with Http() as http:
        provider = make(Credentials("sk-1", "https://acme.example"), http)
        provider._downloader._resolver = lambda: names
        provider._downloader._waits = ()
        with pytest.raises(UpstreamError):
            await provider._downloader.fetch("https://files.example/x.png", DELIVERY_ERRORS)
        assert not names.closed
        await provider.aclose()
        assert names.closed
