"""Failures of the BFL protocol at each of its three steps: order, poll, download."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.providers import Credentials
from pomelo.providers.bfl import BFL
from pomelo.providers.errors import RetryPolicy
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.providers.http.downloads import MAX_FILE_BYTES, Downloader
from pomelo.providers.images import DELIVERY_ERRORS
from pomelo.testing import FaultUpstream, Gate, Reply, Script, Stop, page, redirect
from pomelo.testing.bfl_protocol import Drawing, delivered, error_reply, invalid, moderated, status
from pomelo.testing.images import make_image
from tests.providers.bfl.test_answers import DEV, NOW
from tests.providers.image_rig import (
    NEVER,
    NEXT,
    check_refused,
    connections_to,
    draw_image,
    failure,
    job,
    listener,
    orders,
    was_connected,
)
from tests.providers.rig import KEY, SECRETS, Rig, check_no_secrets, open_provider, open_rig
from tests.unit.refusals import refused


@pytest.fixture(name="rig")
async def _rig() -> AsyncIterator[Rig]:
    async with open_rig(BFL, "bfl", **NOW, grace=0.3) as rig:
        yield rig


REFUSED_ORDERS: list[tuple[Script, str, int | None, RetryPolicy]] = [
    (error_reply(404, "Task not found"), "provider_failed", None, NEXT),
    (invalid("width", SECRETS), "invalid_parameter", None, NEVER),
    (invalid("safety_tolerance", SECRETS), "provider_failed", None, NEXT),
    (error_reply(422, [7, {"loc": 7}, {"loc": ["body", 7]}]), "provider_failed", None, NEXT),
    (error_reply(400, "Request Moderated"), "content_policy_violation", None, NEVER),
    (status("Request Moderated", http=403), "content_policy_violation", None, NEVER),
    (status("Request Moderated"), "content_policy_violation", None, NEVER),
    (error_reply(500, "Error"), "provider_unavailable", 5, NEVER),
    (Reply(steps=(b'{"id":"T1"}',)), "provider_failed", None, NEVER),
    (Reply(steps=(b'{"id":"caf\xc3","polling_url":"x"}',)), "provider_failed", None, NEVER),
    (Reply(steps=(b"x" * 9_000_000,)), "provider_failed", None, NEVER),
]


@pytest.mark.parametrize(("script", "code", "wait", "retry"), REFUSED_ORDERS)
async def test_an_order_that_fails_is_mapped_to_an_error_and_sent_once(
    rig: Rig, script: Script, code: str, wait: int | None, retry: RetryPolicy, stream: bool
) -> None:
    await check_refused(rig, script, job(DEV, stream=stream), code, wait, retry)


async def test_a_refused_parameter_is_named_as_in_the_contract(rig: Rig) -> None:
    for theirs, ours in (("steps", "num_inference_steps"), ("guidance", "guidance_scale"), ("seed", "seed")):
        rig.script(invalid(theirs))
        error = await failure(rig.provider, job(DEV))
        assert error.field == ours
        assert ours in error.message


ENDS: list[tuple[Script, str]] = [
    (moderated(), "content_policy_violation"),
    (moderated("Request Moderated"), "content_policy_violation"),
    (status("Error"), "provider_failed"),
    (status("Failed", details={"reason": SECRETS}), "provider_failed"),
    (status("error"), "provider_failed"),
    (status("Ready"), "provider_failed"),
    (status("Ready", result={}), "provider_failed"),
    (status("Ready", result={"sample": None}), "provider_failed"),
    (status("Ready", result=[1]), "provider_failed"),
    (status("Pending", status=None), "provider_failed"),
    (status("Pending", status=7), "provider_failed"),
    (Reply(steps=(b"[]",)), "provider_failed"),
    (Reply(steps=(b"null",)), "provider_failed"),
    (error_reply(401, SECRETS), "provider_failed"),
    (error_reply(402, SECRETS), "provider_failed"),
    (error_reply(403, SECRETS), "provider_failed"),
    (error_reply(404, "Not Found"), "provider_failed"),
    (redirect("/bfl/v1/get_result?id=other"), "provider_failed"),
    (page(), "provider_failed"),
    (error_reply(429, SECRETS), "provider_unavailable"),
    (error_reply(500, SECRETS), "provider_unavailable"),
    (Reply(before=(Stop.RESET,)), "provider_unavailable"),
    (Reply(steps=(b'{"sta', Stop.CLOSE)), "provider_failed"),
    (Reply(steps=(b"x" * 9_000_000,)), "provider_failed"),
]


@pytest.mark.parametrize(("script", "code"), ENDS)
async def test_a_task_that_fails_is_mapped_to_an_error_and_ordered_once(
    rig: Rig, script: Script, code: str, stream: bool
) -> None:
    rig.script(Drawing(polls=(status("Pending"), script), done=False))
    error = await failure(rig.provider, job(DEV, stream=stream))
    assert (error.code, error.retry) == (code, NEVER), "it would be ordered again"
    check_no_secrets(error)
    assert orders(rig) == 1


FAILING_POLLS: list[Script] = [
    error_reply(429, SECRETS),
    error_reply(500, SECRETS),
    error_reply(503, SECRETS),
    page(502),
    page(),
    Reply(steps=(b"null",)),
    Reply(steps=(b"[]",)),
    Reply(steps=(b'{"message":"busy"}',)),
    status("Pending", status=None),
    Reply(before=(Stop.CLOSE,)),
    Reply(before=(Stop.RESET,)),
    Reply(steps=(b'{"sta', Stop.CLOSE)),
]


@pytest.mark.parametrize("failing_poll", FAILING_POLLS)
async def test_a_failing_poll_is_repeated_three_times_in_a_row(rig: Rig, failing_poll: Script) -> None:
    rig.script(Drawing(polls=(*(failing_poll,) * 3, status("Pending"), *(failing_poll,) * 3)))
    await draw_image(rig.provider, job(DEV))
    rig.script(Drawing(polls=(failing_poll,), done=False))
    error = await failure(rig.provider, job(DEV))
    assert error.retry == NEVER
    assert orders(rig) == 2


async def test_a_poll_without_a_response_is_repeated(rig: Rig) -> None:
    rig.script(Drawing(polls=(Reply(before=(Gate(),)), Reply(steps=(b"{", Gate())))))
    async with open_provider(BFL, rig.bfl_base_url, **NOW, timeouts=Timeouts(whole=0.05)) as provider:
        await draw_image(provider, job(DEV))


async def test_a_task_that_remains_unknown_fails(rig: Rig) -> None:
    for lost in (status("Task not found"), error_reply(404, "Task not found"), error_reply(404, "Not Found")):
        rig.script(Drawing(polls=(lost,), done=False))
        async with open_provider(BFL, rig.bfl_base_url, interval=0.001, grace=0.02) as provider:
            error = await failure(provider, job(DEV))
        assert (error.code, error.retry) == ("provider_failed", NEVER)


async def test_a_known_task_that_is_not_found_for_a_moment_is_polled_again(rig: Rig) -> None:
    lost = (status("Task not found"), error_reply(404, "Task not found"), error_reply(404, "Not Found"))
    rig.script(Drawing(polls=(status("Pending"), *lost, status("Pending"), *lost)))
    async with open_provider(BFL, rig.bfl_base_url, interval=0.001, grace=0.0) as provider:
        await draw_image(provider, job(DEV))
    assert orders(rig) == 1


HUGE = b"\x89PNG\r\n\x1a\n" + b"x" * (1024 * 1024 - 8)


async def test_an_image_is_not_read_beyond_the_limit(rig: Rig) -> None:
    rig.script(Drawing(delivery=(Reply(steps=(HUGE,) * 200),)))
    await failure(rig.provider, job(DEV))
    async with asyncio.timeout(20):
        await rig.requests[-1].left.wait()
    assert rig.requests[-1].bytes_sent < MAX_FILE_BYTES + 16 * len(HUGE)  # what the sockets hold


async def test_the_largest_image_is_accepted(rig: Rig) -> None:
    end = make_image()[-12:]
    rig.script(Drawing(delivery=(Reply(steps=(*(HUGE,) * 31, HUGE[: -len(end)], end)),)))
    assert len((await draw_image(rig.provider, job(DEV)))[0]) == MAX_FILE_BYTES


@pytest.mark.parametrize(
    "silent", [Reply(steps=(make_image()[:9], Gate())), Reply(before=(Gate(),))], ids=["body", "head"]
)
async def test_a_download_that_goes_silent_is_repeated(rig: Rig, silent: Reply) -> None:
    rig.script(Drawing(delivery=(silent, delivered(make_image()))))
    async with open_provider(BFL, rig.bfl_base_url, **NOW, timeouts=Timeouts(whole=0.1)) as provider:
        assert (await draw_image(provider, job(DEV)))[0] == make_image()


UNKNOWN_YET = (
    error_reply(404, "Not Found"),
    error_reply(404, "Task not found"),
    status("Task not found", http=404),
    error_reply(404, [{"loc": ["query", "id"]}]),
    page(404),
    Reply(404),
)


@pytest.mark.parametrize("unknown", UNKNOWN_YET)
async def test_a_task_that_is_briefly_unknown_after_its_order_is_polled_again(
    rig: Rig, unknown: Script, stream: bool
) -> None:
    rig.script(Drawing(polls=(unknown,) * 5))
    async with open_provider(BFL, rig.bfl_base_url, **NOW, grace=20.0) as provider:
        await draw_image(provider, job(DEV, stream=stream))
    assert orders(rig) == 1


async def test_a_delivery_that_stalls_passes_the_deadline(rig: Rig) -> None:
    rig.script(Drawing(delivery=(Reply(steps=(make_image()[:9], Gate())),)))
    async with open_provider(BFL, rig.bfl_base_url, **NOW, timeouts=Timeouts(whole=0.05)) as provider:
        error = await failure(provider, job(DEV))
    assert (error.code, error.retry) == ("deadline_exceeded", NEVER)


# --- links that lead astray

ASTRAY = [
    "https://api.bfl.ai.evil.example/v1/get_result?id=1",
    "https://evilbfl.ai/v1/get_result?id=1",
    "https://bfl.ai@evil.example/",
    "https://evil.example/#.bfl.ai",
    "https://evil.example/api.bfl.ai",
    "https://api.bfl.ai:8443/v1/get_result?id=1",
    "http://api.bfl.ai/v1/get_result?id=1",
    "https://user:word@api.bfl.ai/v1/get_result",
    "https://api.bfl.ai\\@evil.example/",
    "https://api.bfl.ai\r\nX-Evil: 1/",
    "https://10.0.0.1/",
    "//api.bfl.ai/v1/get_result",
    "file:///etc/passwd",
    "",
    None,
    7,
    ["https://api.bfl.ai/"],
]


@pytest.mark.parametrize("url", ASTRAY)
async def test_the_key_is_not_sent_to_a_foreign_polling_url(rig: Rig, url: Any) -> None:
    rig.script(Drawing(order={"polling_url": url}))
    error = await failure(rig.provider, job(DEV))
    assert (error.code, error.retry) == ("provider_failed", NEVER)
    check_no_secrets(error)
    assert len(rig.requests) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_another_port_of_this_machine_is_another_host(rig: Rig, scheme: str, host: str) -> None:
    with listener() as elsewhere:
        url = f"{scheme}://{host}:{elsewhere.getsockname()[1]}/"
        for drawing in (Drawing(polling_url=url), Drawing(sample=url)):
            rig.script(drawing)
            error = await failure(rig.provider, job(DEV))
            assert error.code == "provider_failed"
        assert not was_connected(elsewhere)


@pytest.mark.parametrize("stage", ["order", "question", "delivery"])
async def test_a_redirect_is_not_followed_at_any_stage(rig: Rig, stage: str) -> None:
    async with FaultUpstream() as elsewhere:
        away = redirect(elsewhere.url + "/bfl/v1/flux-dev", 308)
        stages: dict[str, Script] = {
            "order": away,
            "question": Drawing(polls=(away,), done=False),
            "delivery": Drawing(delivery=(away,)),
        }
        rig.script(stages[stage])
        assert (await failure(rig.provider, job(DEV))).code == "provider_failed"
        assert elsewhere.requests == []


async def test_an_origin_that_the_operator_names_may_deliver_and_gets_no_key(rig: Rig) -> None:
    async with FaultUpstream() as store:
        store.default = delivered(make_image())
        rig.default = Drawing(sample=f"{store.url}/bfl/delivery/T1/sample.png?sig=1")
        async with open_provider(BFL, rig.bfl_base_url, **NOW) as provider:
            assert (await failure(provider, job(DEV))).code == "provider_failed"
        assert store.requests == []
        async with open_provider(BFL, rig.bfl_base_url, **NOW, origins=(store.url,)) as provider:
            assert (await draw_image(provider, job(DEV)))[0] == make_image()
        (download,) = store.requests
        assert KEY not in str(dict(download.headers))


async def test_an_origin_for_deliveries_gets_no_polls_with_the_key(rig: Rig) -> None:
    async with FaultUpstream() as store:
        rig.script(Drawing(polling_url=f"{store.url}/bfl/v1/get_result?id=1"))
        async with open_provider(BFL, rig.bfl_base_url, **NOW, origins=(store.url,)) as provider:
            assert (await failure(provider, job(DEV))).code == "provider_failed"
        assert store.requests == []


# --- leaving


async def test_closing_the_stream_after_an_event_ends_the_polls(rig: Rig) -> None:
    rig.script(Drawing(polls=(status("Pending", progress=0.5),), done=False))
    answer = rig.provider.image(job(DEV, stream=True))
    assert (await anext(answer)).image_progress.progress == 0
    assert (await anext(answer)).image_progress.progress == 0.5
    await answer.aclose()
    seen = len(rig.requests)
    rig.script(Drawing())
    await draw_image(rig.provider, job(DEV))
    assert len(rig.requests) == seen + 3


async def test_no_connection_is_left_open(rig: Rig) -> None:
    port = int(rig.url.rpartition(":")[2])
    async with open_provider(BFL, rig.bfl_base_url, **NOW) as provider:
        for script in (Drawing(), Drawing(sample="https://[::1]/"), Drawing(delivery=(page(),)), page()):
            rig.script(script)
            await asyncio.gather(draw_image(provider, job(DEV)), return_exceptions=True)
        assert connections_to(port) == 1, "the one that is kept for later"
    assert connections_to(port) == 0


async def test_an_ordered_image_is_not_lost_while_all_connections_of_the_host_are_taken(
    rig: Rig, stream: bool
) -> None:
    limiter = ConnectionLimiter(1, max_wait=0.01)
    host = rig.url.removeprefix("http://")
    async with Http(connections=limiter) as http:
        provider = BFL(Credentials(KEY, rig.bfl_base_url), http, **NOW)
        drawing = asyncio.create_task(draw_image(provider, job(DEV, stream=stream)))
        await rig.received()
        refused = limiter.refused
        await limiter.acquire(host, "other")
        while limiter.refused < refused + 6:  # noqa: ASYNC110 - more polls than may fail
            await asyncio.sleep(0.001)
        limiter.release(host, "other")
        assert (await drawing)[1] == "image/png"
        await provider.aclose()
    assert orders(rig) == 1
    assert limiter.in_use == 0


async def test_an_image_that_gets_no_connection_for_its_delivery_is_requested_again(rig: Rig) -> None:
    limiter = ConnectionLimiter(1, max_wait=0.01)
    host = rig.url.removeprefix("http://")
    async with Http(connections=limiter) as http:
        links = Downloader(http, rig.bfl_base_url, "bfl.ai", waits=(0.01, 0.01))
        await limiter.acquire(host, "other")
        fetching = asyncio.create_task(links.fetch(f"{rig.url}/bfl/x", DELIVERY_ERRORS))
        while limiter.refused < 2:  # noqa: ASYNC110 - a count has no event
            await asyncio.sleep(0.001)
        limiter.release(host, "other")
        with pytest.raises(PomeloError) as raised:
            await fetching
        assert raised.value.code != "overloaded", "the vendor was asked in the end"
        await limiter.acquire(host, "other")
        with refused("overloaded"):
            await links.fetch(f"{rig.url}/bfl/x", DELIVERY_ERRORS)
        limiter.release(host, "other")
        await links.aclose()
