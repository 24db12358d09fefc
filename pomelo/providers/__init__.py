"""Who can serve a task: the table of the built-in providers, and their opening and closing.

`pomelo.app` calls `open_providers`; the engine gets the result. A vendor's wire is in the vendor's own
module; `pomelo.providers.registry` adds plug-ins and hosts to the table. Nothing here knows a vendor.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pomelo.providers.base import Provider
    from pomelo.providers.http.client import Timeouts
    from pomelo.providers.http.connections import ConnectionLimiter
    from pomelo.providers.registry import Entry
    from pomelo.turns import Turns

__all__ = ["BUILTIN", "GROUP", "SANDBOX", "Credentials", "open_providers"]

SANDBOX = "sandbox"
"""The provider that answers test keys; it needs no credentials and no network."""

GROUP = "pomelo.providers"
"""The group of entry points by which a package outside adds a provider."""

BUILTIN: Mapping[str, str] = {
    "openai": "pomelo.providers.chat.openai:OpenAI",
    "anthropic": "pomelo.providers.anthropic:Anthropic",
    "mistral": "pomelo.providers.chat.mistral:Mistral",
    "bfl": "pomelo.providers.bfl:BFL",
    "together": "pomelo.providers.together:Together",
    "replicate": "pomelo.providers.replicate:Replicate",
    "elevenlabs": "pomelo.providers.elevenlabs.elevenlabs:ElevenLabs",
}
"""Name, as routes of the catalogue have it -> "module:Class". A class is called with (credentials, http)."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What is needed to call a vendor: a key (None: there is none) and where its API begins (empty: where
    the vendor has it)."""

    api_key: str | None = field(repr=False)
    base_url: str = ""


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
    """The providers by name: the sandbox, and each of `entries` with its credentials. Leaving closes all.

    They share one `Http`; `timeouts`, `connections` and `turns` (those of the event loop) replace
    its defaults; `origins` may deliver files whatever their addresses.

    Raises:
        ValueError: a provider can't be made; the message is one line that names it.
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
            except BaseException as error:  # whatever a plug-in does
                fault = type(error).__name__  # its message may hold the key
                raise ValueError(f"the provider {entry.name} can't be opened: {fault}") from error
        for provider in providers.values():
            stack.push_async_callback(provider.aclose)
        yield providers
