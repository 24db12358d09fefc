"""OpenAI: chat completions with its own names for the end user and for what a stream is to bear.

`open_providers` makes it; the engine calls `text`. What it reads of a route is told in `chat`.
"""

from __future__ import annotations

from pomelo.providers import Credentials
from pomelo.providers.base import Probe
from pomelo.providers.chat.chat import Chat, Profile
from pomelo.providers.http.client import Http

PROFILE = Profile(
    "openai",
    user_field="safety_identifier",
    user_most=64,
    # Padding against listeners who count bytes; all that it would do here is cost time.
    stream_options={"include_usage": True, "include_obfuscation": False},
)


class OpenAI(Chat):
    """OpenAI as a provider of text."""

    base_url = "https://api.openai.com/v1"
    probe = Probe("/models")

    def __init__(self, credentials: Credentials, http: Http) -> None:
        url = credentials.base_url.rstrip("/") + "/chat/completions"
        super().__init__(credentials.api_key, url, PROFILE, http)
