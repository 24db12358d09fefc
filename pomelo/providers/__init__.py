"""Who can serve a task: the table of providers, and their opening and closing.

`pomelo.app` calls `open_providers`; the engine gets the result. A vendor's wire is in the vendor's own
module, which is loaded when it is opened; nothing here knows one.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomelo.providers.base import Provider
    from pomelo.providers.http import Timeouts

__all__ = ["BUILTIN", "SANDBOX", "Credentials", "open_providers"]

SANDBOX = "sandbox"
"""The provider that answers test keys; it needs no credentials and no network."""

BUILTIN: Mapping[str, str] = {
    "openai": "pomelo.providers.openai:OpenAI",
    "anthropic": "pomelo.providers.anthropic:Anthropic",
    "mistral": "pomelo.providers.mistral:Mistral",
    "bfl": "pomelo.providers.bfl:BFL",
    "together": "pomelo.providers.together:Together",
    "replicate": "pomelo.providers.replicate:Replicate",
    "elevenlabs": "pomelo.providers.elevenlabs:ElevenLabs",
    SANDBOX: "pomelo.providers.sandbox:Sandbox",
}
"""Name, as routes of the catalogue have it -> "module:Class". A class is called with (credentials, http)."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What is needed to call a vendor: a key (None: not configured) and where its API begins."""

    api_key: str | None = field(repr=False)
    base_url: str


@asynccontextmanager
async def open_providers(
    credentials: Mapping[str, Credentials], *, timeouts: "Timeouts | None" = None
) -> "AsyncIterator[dict[str, Provider]]":
    """The providers by name: the sandbox, and each that `credentials` names. Leaving closes them all.

    They share one `Http`; `timeouts` are its, where the defaults don't do.

    Raises:
        ValueError: no provider has a name of `credentials`.
    """
    from pomelo.providers.http import Http

    unknown = sorted(credentials.keys() - BUILTIN.keys())
    if unknown:
        raise ValueError(f"no provider is named {', '.join(unknown)}; there are {', '.join(BUILTIN)}")
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http(timeouts))
        providers: dict[str, Provider] = {}
        for name, reference in BUILTIN.items():
            if name == SANDBOX:
                provider: Provider = _load(reference)()
            elif name in credentials:
                provider = _load(reference)(credentials[name], http)
            else:
                continue
            stack.push_async_callback(provider.aclose)
            providers[name] = provider
        yield providers


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
