"""A limit is added as a function and a row in the table of limits."""

from __future__ import annotations

from pathlib import Path

from tests.extensions.checkout import Checkout

MODULE = "pomelo/engine/limits.py"
IMAGES_A_DAY = """

def _images(call: LimitedCall) -> Counter | None:
    if call.model is None or TASK_TYPES[call.model.task_type].name != "image":
        return None
    return Counter("images", 0 if call.accepted is None else call.accepted.estimate.maximum.images, 2, 86_400.0)"""
STREAMS_OF_A_KEY = """

def _streams(call: LimitedCall) -> Counter:
    streams = call.accepted is not None and call.accepted.job.stream
    return Counter(f"streams:{call.principal.key_id}", int(streams), 1)"""


def test_added_limits_are_reported_and_refuse_over_every_protocol(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.add_files("limit")
    checkout.add_after(
        MODULE,
        'return Counter(f"tokens:{call.model.name}", likely, call.plan.tokens, WINDOW)',
        IMAGES_A_DAY + STREAMS_OF_A_KEY,
    )
    checkout.add_after(
        MODULE,
        'Limit(_concurrency, "-Concurrent", "concurrency_limit_exceeded", quota="concurrent_requests"),',
        """\
    Limit(
        _images,
        "-Images",
        "rate_limit_exceeded",
        message="Too many images today",
        actual=lambda usage: usage.images,
    ),
    Limit(_streams, "-Streams", "concurrency_limit_exceeded", message="Too many streams"),""",
    )
    checkout.pytest("tests/check_limit.py")
    assert checkout.additions() == {MODULE: 18}
