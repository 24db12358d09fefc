"""OpenAI: chat completions with its own field for the end user, and its own stream options."""

from __future__ import annotations

from pomelo.providers import Credentials
from pomelo.providers.base import Probe
from pomelo.providers.chat.chat import Chat, Profile
from pomelo.providers.http.client import Http

PROFILE = Profile(
    "openai",
    user_field="safety_identifier",
    user_most=64,
    # Padding against eavesdroppers who count bytes costs time, and is of no use here.
    stream_options={"include_usage": True, "include_obfuscation": False},
)


class OpenAI(Chat):
    base_url = "https://api.openai.com/v1"
    probe = Probe("/models")

    def __init__(self, credentials: Credentials, http: Http) -> None:
        super().__init__(credentials, http, PROFILE)
