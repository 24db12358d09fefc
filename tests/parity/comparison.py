"""One task over several protocols, and the comparison of the outcomes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from tests.driver import Outcome, TaskRequest
from tests.grpc_driver import GrpcDriver
from tests.rest_driver import RestDriver

Driver = GrpcDriver | RestDriver


async def ask_all(drivers: Mapping[str, Driver], request: TaskRequest) -> dict[str, Outcome]:
    """Runs the same task with every driver, concurrently."""
    outcomes = await asyncio.gather(*[driver(request) for driver in drivers.values()])
    return dict(zip(drivers, outcomes, strict=True))


def assert_same(outcomes: Mapping[str, Outcome], request: TaskRequest) -> None:
    """Asserts that all outcomes have the same output or error, and treat the request id the same."""
    first, *others = outcomes.items()
    for name, other in others:
        assert other.code == first[1].code, f"{name}: {other} but {first}"
        assert other.output == first[1].output, f"{name}: {other.output} but {first}"
        if other.code != "deadline_exceeded":
            message, expected = _without_time(other.message), _without_time(first[1].message)
            assert message == expected, f"{name}: {other} but {first}"
            assert other.headers.get("x-pomelo-mode") == first[1].headers.get("x-pomelo-mode"), name
            if not request.stream:  # a stream's error comes after the headers
                assert other.retry_after == first[1].retry_after, name
    for name, outcome in outcomes.items():
        if name == "grpc" and outcome.code == "deadline_exceeded":
            continue  # the client's own clock may end the call before the server answers
        request_id = outcome.headers["x-request-id"]
        assert request_id == request.request_id if request.request_id else request_id.startswith("req_"), name


def _without_time(message: str) -> str:
    return re.sub(r"Reset at \S+", "Reset at a time", message)
