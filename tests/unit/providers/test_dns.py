"""The memory of host names: how long names are remembered, and what ends with the client."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pomelo.providers.http import dns
from pomelo.providers.http.dns import Addresses
from tests.unit.providers.names import Names
from tests.waiting import cancel, until


async def test_names_whose_time_has_passed_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "TTL", 0.0)
    addresses = Addresses(Names())
    for number in range(50):
        await addresses.resolve(f"host{number}.example", 443)
    assert len(addresses._known) == 1


async def test_names_that_are_remembered_stay_when_another_is_looked_up() -> None:
    names = Names()
    addresses = Addresses(names)
    for host in ("a.example", "b.example", "a.example", "b.example"):
        ((*_, address),) = await addresses.resolve(host, 443)
        assert address == ("127.0.0.1", 443)
    assert names.asked == ["a.example", "b.example"]
    await addresses.resolve("a.example", 80)
    assert len(names.asked) == 3, "another port was taken for the same"


async def test_a_caller_that_leaves_does_not_end_the_look_up_of_the_others() -> None:
    names = Names(wait=0.01)
    addresses = Addresses(names)
    leaving, staying = (asyncio.create_task(addresses.resolve("a.example", 443)) for _ in range(2))
    await until(lambda: bool(names.asked))
    await cancel(leaving)
    ((*_, address),) = await staying
    assert address == ("127.0.0.1", 443)
    assert (names.asked, names.cancelled) == (["a.example"], 0)


async def test_closing_ends_the_look_ups_and_the_resolver() -> None:
    names = Names(wait=60)
    addresses = Addresses(names)
    call = asyncio.create_task(addresses.resolve("a.example", 443))
    while not names.asked:  # noqa: ASYNC110 - a list has no event
        await asyncio.sleep(0)
    await addresses.close()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (names.cancelled, names.closed) == (1, True)


@pytest.mark.parametrize(
    ("host", "family"),
    [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("fe80::1%lo", socket.AF_INET6)],
)
async def test_an_address_is_not_looked_up(host: str, family: socket.AddressFamily) -> None:
    names = Names()
    ((found, *_, address),) = await Addresses(names).resolve(host, 443)
    assert (found, address, names.asked) == (family, (host, 443), [])
