"""Many callers who leave at random: afterwards the balance equals the usage records, and no reservation is left."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from typing import Any
from urllib.parse import urlsplit

from pomelo.catalog.pricing import Usage, cost, decode_prices
from tests.app import RICH, Account, RunningApp, app_fixture
from tests.driver import PROTOCOL, REST_PROTOCOL, STREAM
from tests.tasks import TASK_BODIES, text_body

TEXTS = ["[[words:30]]", "[[words:30]] [[pace:0.002]]", "[[words:9]] [[cut]]", "[[delay:0.01]]"]
ERRORS = {
    "provider_failed",  # [[cut]]
    "deadline_exceeded",
    "concurrency_limit_exceeded",
    "idempotency_conflict",
    "idempotency_mismatch",
    "insufficient_credits",
}

app = app_fixture()


async def settled(app: RunningApp, account: Account, granted: int = RICH) -> list[Any]:
    """Waits until no task runs; returns the records, after comparing the balance with them."""
    await app.idle(account)
    balance = await app.balance(account)
    records = await app.records(account)
    assert balance.held == 0
    assert balance.available == granted - balance.spent >= 0
    assert sum(record.cost for record in records) == balance.spent
    for record in records:
        counts = ("input_tokens", "output_tokens", "characters", "images", "pixels", "audio_ms")
        used = Usage(*(getattr(record, name) for name in counts))
        assert cost(used, decode_prices(record.prices)) == record.cost + record.uncollected
        assert record.uncollected == 0
    assert len({record.task_id for record in records}) == len(records)
    return records


@PROTOCOL
async def test_the_balance_equals_the_records_after_many_callers_left(app: RunningApp, protocol: str) -> None:
    rng = random.Random(protocol)
    account = await app.account("all", test=2_000_000)
    outcomes: list[str] = []

    async def ask(number: int) -> None:
        task_type = rng.choice(list(TASK_BODIES))
        body = TASK_BODIES[task_type]
        if task_type == "text":
            text = rng.choice(TEXTS)
            body = text_body(f"{text} {number}", max_tokens=40)
        patience = rng.choice([None, None, rng.random() * 0.08])
        request_task = app.ask(
            protocol,
            account.test,
            body,
            stream=rng.random() < 0.6,
            within=rng.choice([None, None, None, 0.03]),
            headers={"Idempotency-Key": f"{protocol}-{number // 3}"} if rng.random() < 0.3 else None,
        )
        try:
            outcomes.append((await asyncio.wait_for(request_task, patience)).code)
        except TimeoutError:
            outcomes.append("left")

    async with asyncio.timeout(60):
        await asyncio.gather(*[ask(number) for number in range(250)])
    records = await settled(app, account, 2_000_000)
    allowed = {"ok", "left", *ERRORS}
    if protocol == "grpc":
        allowed.add("unavailable")  # the client itself allows only so many calls on a connection
    assert {"ok", "left"} <= set(outcomes) <= allowed
    assert records


@REST_PROTOCOL
@STREAM
async def test_a_request_can_be_repeated_after_a_reset_at_any_byte_of_its_answer(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    address = urlsplit(app.urls[protocol])
    body = text_body("[[words:12]] again and again", max_tokens=20)
    for offset in (0, 1, 15, 80, 200, 400, 600, 800, 900, 1000, 1100, 1300, 1600, 2000, 2500, 3000, 4000):
        account = await app.account("wide")
        data = json.dumps(body | {"stream": stream}).encode()
        head = (
            f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {account.test}\r\n"
            f"Content-Type: application/json\r\nIdempotency-Key: reset\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(head.encode() + data)
        received = b""
        while len(received) < offset and (chunk := await reader.read(offset - len(received))):
            received += chunk
            if received.endswith((b"[DONE]\n\n\r\n0\r\n\r\n", b"}")):
                break
        peer: socket.socket = writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        first = await settled(app, account)
        assert len(first) <= 1
        headers = {"Idempotency-Key": "reset"}
        outcome = await app.ask(protocol, account.test, body, stream=stream, headers=headers)
        assert outcome.code == "ok"
        records = await settled(app, account)
        assert sum(record.complete for record in records) == 1, "one complete answer was charged"
        if first and first[0].complete:
            assert outcome.id == first[0].task_id
            assert outcome.headers["x-credits-charged"] == "0"
        if not stream:
            assert len(records) == 1
