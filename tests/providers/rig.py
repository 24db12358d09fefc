"""What the tests of all providers share: a server that plays the vendor, the provider that calls it, and jobs."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import aiohttp

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.providers import Credentials
from pomelo.providers.base import AudioSource, Event, Job, fit_hook, fit_job
from pomelo.providers.http.client import Http, Timeouts
from pomelo.tasks import TASK_TYPES
from pomelo.testing import FaultUpstream, Received

KEY = "key-canary-2718"
PROMPT = "my canary prompt"
SECRETS = f"{KEY} {PROMPT} <b>body</b>"

AT_ONCE = 3.0
"""Seconds that may pass until the vendor sees that a caller has left: fewer than until an idle connection is closed."""


class Rig(FaultUpstream):
    """A server that plays the vendor, and the provider that calls it."""

    provider: Any


@asynccontextmanager
async def open_rig(make: Callable[..., Any], vendor: str, **options: Any) -> AsyncIterator[Rig]:
    """Opens a provider in front of a server that takes only its key; `options` are those of `open_provider`."""
    async with Rig(api_key=KEY) as rig, open_provider(make, base_url(rig, vendor), **options) as rig.provider:
        yield rig


def base_url(upstream: FaultUpstream, vendor: str) -> str:
    """The base URL of a vendor's protocol on a server."""
    return str(getattr(upstream, f"{vendor}_base_url"))


@asynccontextmanager
async def open_provider(
    make: Callable[..., Any],
    base_url: str,
    *,
    key: str | None = KEY,
    timeouts: Timeouts | None = None,
    origins: tuple[str, ...] = (),
    **options: Any,
) -> AsyncIterator[Any]:
    """A provider, called at `base_url`; `options` are its own."""
    async with Http(timeouts, origins=origins) as http:
        provider = make(Credentials(key, base_url), http, **options)
        try:
            yield provider
        finally:
            await provider.aclose()


def make_job(
    task_type: TaskType.ValueType,
    route: Route,
    task_input: Any,
    *,
    stream: bool,
    limits: Limits | None = None,
    audio: AudioSource | None = None,
    user: str = "",
) -> Job[Any]:
    """A job for a model with one route and no price."""
    model = Model("a-model", task_type, (route,), limits or Limits(), Prices(), "test")
    return Job("task_1", model, route, task_input, stream, deadline=1e12, audio=audio, user=user)


def run(provider: Any, job: Job[Any]) -> AsyncGenerator[Event, None]:
    """The provider's events for a job of any task type, which is fitted as the engine does."""
    task_type = TASK_TYPES[job.model.task_type].name
    events: AsyncGenerator[Event, None] = getattr(provider, task_type)(
        fit_job(job, fit_hook(provider, task_type))
    )
    return events


async def read_all(provider: Any, job: Job[Any]) -> list[Event]:
    """All events of the provider for a job."""
    async with aclosing(run(provider, job)) as events:
        return [event async for event in events]


async def ask(method: str, url: str, **what: Any) -> tuple[int, Any]:
    """Sends a request without a provider; returns the status of the answer, and its body, parsed if it is JSON."""
    async with aiohttp.ClientSession() as session, session.request(method, url, **what) as answer:
        is_json = answer.content_type == "application/json"
        return answer.status, await (answer.json() if is_json else answer.read())


async def check_left(received: Received, since: float) -> None:
    """The vendor saw the connection close within AT_ONCE of `since`."""
    async with asyncio.timeout(20):
        await received.left.wait()
    assert received.left_at is not None
    assert received.left_at - since < AT_ONCE


def check_no_secrets(error: BaseException) -> None:
    """Nothing of the key, the prompt or the vendor's words is in the message or in a log of the error."""
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__)
    for secret in (KEY, PROMPT, "canary", "<b>", "upstream broke", "sig="):
        assert secret not in shown
