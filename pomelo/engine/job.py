"""A task as it was accepted: the job for its provider, and what only the engine knows of it."""

from __future__ import annotations

from typing import Any

from pomelo.call import Principal
from pomelo.catalog.pricing import Prices
from pomelo.engine.routing import Candidate
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.providers.base import Job
from pomelo.stores.ledger import IdempotencyKey
from pomelo.tasks.base import Estimate, TaskDefinition
from pomelo.values import value_type


@value_type(frozen=True, slots=True, kw_only=True)
class AcceptedJob:
    """A task that only limits, credits and its provider can still refuse.

    `user` and `metadata` are the caller's, for the usage record; `delivery` is how the result contains media.
    `job` is what the provider of the first route gets. `candidates` are the routes, tried in order; empty: no
    provider of the model is configured. `estimate` and `prices` are what is reserved and charged: for a test
    key those of the model's first route in live mode. `media_bytes` is the most that storing the output can
    take, 0 if nothing is stored. `created` is Unix time in whole seconds.
    """

    job: Job[Any]
    user: str
    metadata: str
    delivery: MediaDelivery.ValueType
    principal: Principal
    protocol: str
    definition: TaskDefinition
    candidates: tuple[Candidate, ...]
    estimate: Estimate
    prices: Prices
    price_version: str
    idempotency_key: IdempotencyKey | None
    media_bytes: int
    created: int
