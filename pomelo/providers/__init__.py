"""The table of the built-in providers, and `open_providers`, which opens and closes them.

`pomelo.providers.registry` adds plug-ins and hosts to the table.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from pomelo.providers.credentials import Credentials

if TYPE_CHECKING:
    from pomelo.providers.base import Provider
    from pomelo.providers.http.client import Timeouts
    from pomelo.providers.http.connections import ConnectionLimiter
    from pomelo.providers.registry import Entry
    from pomelo.turns import Turns

__all__ = ["BUILTIN", "GROUP", "SANDBOX", "Credentials", "open_providers"]

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
) -> AsyncIterator[dict[str, Provider]]:
    """Open the sandbox, and each of `entries` with its credentials: a mapping by name. Leaving closes all.

    The providers share one `Http`, which gets `timeouts`, `connections`, `origins` and `turns`.

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
                providers[entry.name] = entry.make(entry.located(credentials), http)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a plug-in may raise anything
                name = type(error).__name__  # the message may contain the key
                raise ValueError(f"the provider {entry.name} can't be opened: {name}") from error
        for provider in providers.values():
            stack.push_async_callback(provider.aclose)
        yield providers
