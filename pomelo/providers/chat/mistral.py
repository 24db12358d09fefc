"""Mistral: chat completions whose schema is closed, so that an undeclared field is refused.

`open_providers` makes it, with a base URL without /v1; the engine calls `text`. What it reads of a route is
told in `chat`. The vendor refuses what the system says after an answer, and an answer without a word. The
count of tokens comes in the last chunk unasked; whether the vendor takes `stream_options` is uncertain, so
they are sent only where a route has `stream_usage = "option"`.
"""

from __future__ import annotations

from pomelo.providers import Credentials
from pomelo.providers.base import Probe
from pomelo.providers.chat.chat import Chat, Profile
from pomelo.providers.http.client import Http

PROFILE = Profile(
    "mistral",
    seed_field="random_seed",
    user_field="none",
    stream_usage="always",
    # Zero is refused; the least that isn't means the same, that only the likeliest token is left.
    least={"top_p": 1e-6},
    system_first=True,
    meanings={"invalid_request_message_order": "invalid_parameter", "3230": "invalid_parameter"},
)


class Mistral(Chat):
    """Mistral as a provider of text."""

    base_url = "https://api.mistral.ai"
    probe = Probe("/v1/models")

    def __init__(self, credentials: Credentials, http: Http) -> None:
        url = credentials.base_url.rstrip("/") + "/v1/chat/completions"
        super().__init__(credentials.api_key, url, PROFILE, http)
