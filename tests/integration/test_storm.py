"""Many callers who come and go as they like: the books balance afterwards, and nothing is left taken."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from pomelo.catalog.pricing import Usage, cost, decode_prices
from tests.app import RICH, Account, RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.tasks import TASK_BODIES, text_body

REFUSALS = {
    "provider_failed",  # [[cut]]
    "deadline_exceeded",
    "concurrency_limit_exceeded",
    "idempotency_conflict",
    "idempotency_mismatch",
    "insufficient_credits",
}

WAY = pytest.mark.parametrize("way", PROTOCOLS)


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("storm")) as opened:
        yield opened


async def settled(house: RunningApp, caller: Account, granted: int = RICH) -> list[Any]:
    """The records, once nothing runs; they and the balance tell the same."""
    async with asyncio.timeout(10):
        while await house.concurrency(caller):
            pass
    balance = await house.balance(caller)
    records = await house.records(caller)
    assert balance.held == 0
    assert balance.available == granted - balance.spent >= 0
    assert sum(record.cost for record in records) == balance.spent
    for record in records:
        used = Usage(
            record.input_tokens,
            record.output_tokens,
            record.characters,
            record.images,
            record.pixels,
            record.audio_ms,
        )
        assert cost(used, decode_prices(record.prices)) == record.cost + record.uncollected
        assert record.uncollected == 0
    assert len({record.task_id for record in records}) == len(records)
    return records


@WAY
async def test_after_a_storm_of_callers_who_leave_the_books_balance(house: RunningApp, way: str) -> None:
    chance = random.Random(way)
    caller = await house.account("all", test=2_000_000)
    outcomes: list[str] = []

    async def one(number: int) -> None:
        kind = chance.choice(list(TASK_BODIES))
        body = TASK_BODIES[kind]
        if kind == "text":
            text = chance.choice(
                ["[[words:30]]", "[[words:30]] [[pace:0.002]]", "[[words:9]] [[cut]]", "[[delay:0.01]]"]
            )
            body = text_body(f"{text} {number}", max_tokens=40)
        patience = chance.choice([None, None, chance.random() * 0.08])
        asked = house.ask(
            way,
            caller.test,
            body,
            stream=chance.random() < 0.6,
            within=chance.choice([None, None, None, 0.03]),
            headers={"Idempotency-Key": f"{way}-{number // 3}"} if chance.random() < 0.3 else None,
        )
        try:
            outcomes.append((await asyncio.wait_for(asked, patience)).code)
        except TimeoutError:
            outcomes.append("left")

    async with asyncio.timeout(60):
        await asyncio.gather(*[one(number) for number in range(250)])
    records = await settled(house, caller, 2_000_000)
    allowed = {"ok", "left", *REFUSALS}
    if way == "grpc":
        allowed.add(
            "unavailable"
        )  # more calls than one connection takes: a client's own matter, not a gateway's
    assert {"ok", "left"} <= set(outcomes) <= allowed
    assert records


@pytest.mark.parametrize("way", ["rest", "remote"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_connection_reset_at_any_byte_leaves_a_request_that_can_be_sent_again(
    house: RunningApp, way: str, stream: bool
) -> None:
    address = urlsplit(house.urls[way])
    body = text_body("[[words:12]] again and again", max_tokens=20)
    for offset in (0, 1, 15, 80, 200, 400, 600, 800, 900, 1000, 1100, 1300, 1600, 2000, 2500, 3000, 4000):
        caller = await house.account("wide")
        data = json.dumps(body | {"stream": stream}).encode()
        head = (
            f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {caller.test}\r\n"
            f"Content-Type: application/json\r\nIdempotency-Key: reset\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(head.encode() + data)
        got = b""
        while len(got) < offset and (piece := await reader.read(offset - len(got))):
            got += piece
            if got.endswith((b"[DONE]\n\n\r\n0\r\n\r\n", b"}")):
                break
        peer: socket.socket = writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        first = await settled(house, caller)
        assert len(first) <= 1
        told = await house.ask(way, caller.test, body, stream=stream, headers={"Idempotency-Key": "reset"})
        assert told.code == "ok"
        records = await settled(house, caller)
        assert sum(record.complete for record in records) == 1, "one whole answer was charged"
        if first and first[0].complete:
            assert told.id == first[0].task_id
            assert told.headers["x-credits-charged"] == "0"
        if not stream:
            assert len(records) == 1
