"""The parts that the application builds from its settings, and its shutdown."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize

from pomelo.catalog.catalog import Catalog
from pomelo.configuration import find_certificate, front_ends
from pomelo.errors import PomeloError
from pomelo.runtime import process
from pomelo.runtime.draining import Draining
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.settings import Settings
from tests.certificates import make_certificate

MIB = 1024 * 1024


@pytest.mark.parametrize(("calls", "account_calls"), [(2_000, 1_000), (11, 5), (1, 1)])
def test_one_account_may_have_half_of_all_calls_and_at_least_one(calls: int, account_calls: int) -> None:
    limits = front_ends.in_flight(Settings(max_calls=calls))
    assert limits == InFlightLimits(calls=calls, account_calls=account_calls)


@pytest.mark.parametrize(("json_limit", "inline_limit"), [(4 * MIB, 3 * MIB), (3 * MIB, 4 * MIB)])
def test_a_grpc_message_may_have_the_largest_body_and_one_mebibyte_more(
    json_limit: int, inline_limit: int
) -> None:
    settings = Settings(json_limit=ByteSize(json_limit), inline_limit=ByteSize(inline_limit))
    options = front_ends.server_options(settings, shared=False)
    assert options.limits.message == 5 * MIB


@pytest.mark.parametrize("shared", [False, True])
def test_grpc_gets_the_address_the_proxies_and_whether_workers_share_it(shared: bool) -> None:
    settings = Settings(grpc="127.0.0.1:1", trusted_proxies=("10.0.0.0/8", "::1"))
    options = front_ends.server_options(settings, shared)
    assert (options.address, options.reuse_port) == ("127.0.0.1:1", shared)
    assert [str(one) for one in options.connections.trusted] == ["10.0.0.0/8", "::1/128"]


@pytest.mark.parametrize(("changes", "times"), [({}, (75.0, 650.0)), ({"idle_timeout": 30.0}, (30.0, 30.0))])
def test_an_idle_timeout_of_the_operator_holds_for_proxies_too(
    changes: dict[str, Any], times: tuple[float, float]
) -> None:
    options = front_ends.gateway_options(Settings(**changes), catalog=Catalog.load)
    assert (options.idle_timeout, options.proxy_idle_timeout) == times


def test_rest_accepts_tls_1_2_and_later_with_the_certificate_of_the_settings(tmp_path: Path) -> None:
    assert find_certificate(Settings()) is None
    make_certificate(tmp_path, "cert", "localhost")
    settings = Settings(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "cert.key")
    certificate = find_certificate(settings)
    assert certificate is not None
    context = certificate.context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_NONE
    assert context.cert_store_stats()["x509"] == 0


def test_a_gateway_is_recognised_by_the_same_secret_or_a_previous_one_only() -> None:
    sent = dict(front_ends.gateway_proof(b"secret").metadata("rest", "192.0.2.1", "Bearer key"))
    sent["authorization"] = "Bearer key"
    assert front_ends.gateway_proof(b"secret").origin(sent, "ipv4:127.0.0.1:5").proven
    assert front_ends.gateway_proof(b"new", (b"x", b"secret")).origin(sent, "ipv4:127.0.0.1:5").proven
    assert not front_ends.gateway_proof(b"another", (b"x",)).origin(sent, "ipv4:127.0.0.1:5").proven
    assert not front_ends.gateway_proof(None).origin(sent, "ipv4:127.0.0.1:5").proven
    assert len(front_ends.gateway_proof(None).metadata("rest", "192.0.2.1", "Bearer key")) == 1


async def test_calls_may_end_within_the_grace_and_the_others_are_ended_after_it() -> None:
    draining, end = Draining(), asyncio.Event()
    short = asyncio.create_task(draining.counted(end.wait)())
    long = asyncio.create_task(draining.counted(asyncio.Event().wait)())
    await asyncio.sleep(0)
    leaving = asyncio.create_task(front_ends.drain(draining, grace=0.2))
    await asyncio.sleep(0)
    with pytest.raises(PomeloError):
        await draining.counted(end.wait)()
    end.set()
    assert await short
    assert not long.done()
    async with asyncio.timeout(20):
        await leaving
    with pytest.raises(PomeloError) as ended:
        await long
    assert ended.value.code == "shutting_down"


async def test_nothing_is_waited_for_without_running_calls() -> None:
    async with asyncio.timeout(20):
        await front_ends.drain(Draining(), grace=60)


async def test_background_work_is_cancelled_on_leaving() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            cancelled.set()
            raise

    async with process.in_background(work()):
        await asyncio.sleep(0)
        assert not cancelled.is_set()
    assert cancelled.is_set(), "leaving waits for the end of the work"
