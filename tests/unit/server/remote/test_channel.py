"""How long a gateway waits for its server."""

from __future__ import annotations

import time

import pytest

from pomelo.network.origin import GatewayProof
from pomelo.server import rpc
from pomelo.server.remote import channel
from pomelo.server.remote.watch import ServerWatch
from tests.calls import call_of


@pytest.mark.parametrize(
    ("proof", "grace"),
    [(GatewayProof(b"k" * 32), channel._GRACE), (GatewayProof(), channel._UNPROVEN_GRACE)],
)
async def test_a_call_ends_some_time_after_its_deadline(proof: GatewayProof, grace: float) -> None:
    async with channel.open_channel("127.0.0.1:1") as opened:
        connection, call = channel.Connection(opened, proof, ServerWatch("")), call_of("any")
        most = call.deadline - time.monotonic()
        timeout = connection.arguments(call)["timeout"]
        least = call.deadline - time.monotonic()
    assert least <= timeout - grace <= most


async def test_a_time_limit_within_a_call_is_not_taken_for_its_deadline() -> None:
    async with channel.open_channel("127.0.0.1:1") as opened:
        connection = channel.Connection(opened, GatewayProof(), ServerWatch(""))
        with pytest.raises(TimeoutError, match="of the disk"), connection.until_deadline(call_of("any")):
            raise TimeoutError("of the disk")


def test_adjusted_fields_are_reported_by_the_names_that_the_caller_used() -> None:
    call = call_of("any")
    call.translate_adjusted = lambda names: names.replace("max_tokens", "max_completion_tokens")
    channel._fill(call, [("x-pomelo-adjusted", "max_tokens"), ("x-request-id", "max_tokens"), ("other", "x")])
    assert call.response_headers == {
        "X-Pomelo-Adjusted": "max_completion_tokens",
        "X-Request-Id": "max_tokens",
    }


def test_a_server_ends_a_late_call_before_a_proven_gateway_does_and_without_a_proof_has_no_such_time() -> (
    None
):
    assert channel._UNPROVEN_GRACE < rpc._GRACE < channel._GRACE
