"""Accepted jobs for tests of the ledger."""

from __future__ import annotations

from typing import Any

from pomelo.call import Principal
from pomelo.catalog.catalog import Model
from pomelo.catalog.pricing import Prices, Usage
from pomelo.engine.job import AcceptedJob
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.providers.base import Job
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import Estimate


def accepted_job(
    task_id: str,
    model: Model,
    usage: Usage,
    principal: Principal,
    *,
    exact: bool = False,
    prices: Prices | None = None,
    tokens: int = 0,
) -> AcceptedJob:
    """A job over REST that uses `usage` and likely `tokens`, at the model's prices or others."""
    given: Any = None
    return AcceptedJob(
        job=Job(
            task_id=task_id,
            model=model,
            route=model.routes[0],
            input=given,
            stream=False,
            deadline=0.0,
            request_id="req_1",
        ),
        user="",
        metadata="",
        delivery=MediaDelivery.MEDIA_DELIVERY_UNSPECIFIED,
        principal=principal,
        protocol="rest",
        definition=TASK_TYPES[model.task_type],
        candidates=(),
        estimate=Estimate(usage, usage, tokens=tokens, exact=exact),
        prices=model.prices if prices is None else prices,
        price_version="",
        idempotency_key=None,
        media_bytes=0,
        created=0,
    )
