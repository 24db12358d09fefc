"""The table of the built-in providers, and `open_providers`, which opens and closes them.

`pomelo.providers.registry` adds plug-ins and hosts to the table.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from pomelo.providers.credentials import Credentials

if TYPE_CHECKING:
    from pomelo.providers.base import Provider
    from pomelo.providers.http.client import Timeouts
    from pomelo.providers.http.connections import ConnectionLimiter
    from pomelo.providers.registry import Entry
    from pomelo.runtime.turns import Turns

__all__ = ["BUILTIN", "GROUP", "SANDBOX", "Credentials", "Unusable", "open_providers"]

log = logging.getLogger("pomelo.providers")

SANDBOX = "sandbox"
"""The provider for test keys; it needs no credentials and no network."""

GROUP = "pomelo.providers"
"""The group of entry points by which another package adds a provider."""

BUILTIN: Mapping[str, str] = {
    "openai": "pomelo.providers.chat.openai:OpenAI",
    "anthropic": "pomelo.providers.anthropic.anthropic:Anthropic",
    "mistral": "pomelo.providers.chat.mistral:Mistral",
    "bfl": "pomelo.providers.bfl:BFL",
    "together": "pomelo.providers.together:Together",
    "replicate": "pomelo.providers.replicate:Replicate",
    "elevenlabs": "pomelo.providers.elevenlabs.elevenlabs:ElevenLabs",
}
"""Name in the routes of the catalogue -> "module:Class". A class is called with (credentials, http)."""


@asynccontextmanager
async def open_providers(
    entries: Collection[Entry],
    credentials: Mapping[str, Credentials],
    *,
    timeouts: Timeouts | None = None,
    origins: Collection[str] = (),
    connections: ConnectionLimiter | None = None,
    turns: Turns | None = None,
    on_broken: Callable[[str, str], None] | None = None,
) -> AsyncIterator[dict[str, Provider]]:
    """Open the sandbox, and each of `entries` with its credentials: a mapping by name. Leaving closes all.

    The providers share one `Http`, which gets `timeouts`, `connections`, `origins` and `turns`. `on_broken`
    is called with the name of a plug-in that can't be opened and the reason, and may raise ValueError; the
    plug-in then is not configured. None: it raises.

    Raises:
        ValueError: a provider can't be opened; the message is one line that names it.
    """
    from pomelo.providers.http.client import Http
    from pomelo.providers.sandbox import Sandbox

    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(
            Http(timeouts, origins=origins, connections=connections, turns=turns)
        )
        providers: dict[str, Provider] = {SANDBOX: Sandbox()}
        for entry in entries:
            try:
                provider = entry.make(entry.located(credentials), http)
                _ = provider.configured, provider.aclose
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a plug-in may raise anything
                name = type(error).__name__  # the message may contain the key
                reason = f"the provider {entry.name} can't be opened: {name}"
                if on_broken is None or not entry.is_plugin:
                    raise ValueError(reason) from error
                on_broken(entry.name, reason)
                provider = Unusable()
            providers[entry.name] = provider
        for name, provider in providers.items():
            stack.push_async_callback(_close, name, provider)
        yield providers


async def _close(name: str, provider: Provider) -> None:
    from pomelo.providers.cancellation import await_bounded

    try:
        await await_bounded(provider.aclose, asyncio.get_running_loop(), closing=True)
    except Exception as error:
        log.error("the provider %s can't be closed: %s", name, type(error).__name__)


class Unusable:
    """In place of a plug-in that can't be used: its models answer `provider_not_configured`."""

    configured = False

    def __init__(self, *args: object) -> None:
        pass

    async def aclose(self) -> None:
        pass
